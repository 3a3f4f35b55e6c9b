"""The split depends on content alone, and copies never stand on both sides."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError
from lorakeet.kinds.images.data import split
from lorakeet.kinds.images.data.split import ImageDataset, evaluation_groups
from lorakeet.kinds.images.spec import ImageSpec
from tiny.pictures import album, drawn

IMAGES = ImageSpec(smallest=8)


def data(folder: Path, **changes: object) -> DataSpec:
    return DataSpec(**{"train": str(folder), "held_out_fraction": 0.25, **changes})  # type: ignore[arg-type]


def load_images(spec: DataSpec, images: ImageSpec) -> ImageDataset:
    return split.load_images(spec, images, tables=Path(spec.train).parent / "tables")


def test_pictures_of_the_kind_have_a_caption_and_are_not_evaluated(tmp_path: Path) -> None:
    train, kind = album(tmp_path / "a", 8), album(tmp_path / "kind", 5, first=30)
    for file in kind.glob("*.txt"):
        file.unlink()
    judged = load_images(data(train), IMAGES).held_out[0]
    Image.open(judged.path).save(kind / "judged.png")
    found = load_images(data(train), replace(IMAGES, prior=str(kind), prior_caption="a thing"))
    assert len(found.prior) == 5 and {row.caption for row in found.prior} == {"a thing"}
    assert [(one.train, one.evaluated) for one in found.alike] == [("judged.png", judged.source)]
    assert load_images(data(train), IMAGES).prior == ()


def test_the_split_does_not_depend_on_names(tmp_path: Path) -> None:
    first = load_images(data(album(tmp_path / "a", 16)), IMAGES)
    other = album(tmp_path / "b", 16)
    for path in sorted(other.iterdir()):
        path.rename(other / f"x{99 - int(path.stem)}{path.suffix}")
    second = load_images(data(other), IMAGES)
    assert len(first.held_out) == 4 and len(first.train) == 12
    assert [row.key for row in first.held_out] == [row.key for row in second.held_out]
    assert first.split_record() == second.split_record()


def versions(folder: Path, number: int, count: int) -> None:
    """Near-copies of one picture."""
    pixels, _ = drawn(number)
    for version in range(count):
        noisy = np.clip(pixels.astype(int) + np.random.default_rng(version).integers(-1, 2, pixels.shape), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(folder / f"v{version}.png")
        (folder / f"v{version}.txt").write_text("one")


def test_an_album_that_looks_like_one_picture_is_reported_with_the_remedy(tmp_path: Path) -> None:
    mixed, one = album(tmp_path / "a", 8), tmp_path / "one"
    versions(mixed, 3, 6)
    (remark,) = [text for text in load_images(data(mixed), IMAGES).remarks if "near_duplicates" in text]
    assert "7 of 14 pictures look like copies of one" in remark
    assert not any("near_duplicates" in text for text in load_images(data(album(tmp_path / "b", 14)), IMAGES).remarks)
    one.mkdir()
    versions(one, 3, 8)
    told = r"No row can be held out.*8 of 8 pictures .* such as v\d\.png and v\d\.png.*near_duplicates 0"
    with pytest.raises(DataError, match=told):
        load_images(data(one), IMAGES)
    found = load_images(data(one), replace(IMAGES, near_duplicates=0))
    assert found.held_out and found.train


def test_near_copies_stay_on_one_side(tmp_path: Path) -> None:
    folder = album(tmp_path / "a", 8)
    for number in range(8):  # for each picture three versions that differ by some noise
        pixels, caption = drawn(number)
        for version in range(3):
            noisy = np.clip(pixels.astype(int) + np.random.default_rng(version).integers(-1, 2, pixels.shape), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{number:03}v{version}.png")
            (folder / f"{number:03}v{version}.txt").write_text(caption)
    found = load_images(data(folder), IMAGES)
    sides = [{row.source[:3] for row in part} for part in (found.train, found.held_out)]
    assert len(found.held_out) == 8 and not sides[0] & sides[1]
    apart = load_images(data(folder), ImageSpec(smallest=8, near_duplicates=0))
    sides = [{row.source[:3] for row in part} for part in (apart.train, apart.held_out)]
    assert sides[0] & sides[1]


@pytest.mark.parametrize(("on_leak", "trained"), [("drop", 5), ("keep", 6)])
def test_leaks_from_a_held_out_folder(tmp_path: Path, on_leak: str, trained: int) -> None:
    size = (96, 96)
    train, judged = album(tmp_path / "a", 6, size=size), album(tmp_path / "b", 4, first=20, size=size)
    Image.fromarray(drawn(2, size=size)[0]).resize((80, 80), Image.Resampling.LANCZOS).save(judged / "copy.png")
    (judged / "copy.txt").write_text("blue box")
    found = load_images(data(train, held_out=str(judged), on_leak=on_leak), IMAGES)
    assert len(found.train) == trained and len(found.held_out) == 5
    assert [(one.train, one.evaluated) for one in found.alike] == [("002.png", "copy.png")]
    assert ("kept" in found.alike[0].action) == (on_leak == "keep")
    with pytest.raises(DataError, match=r"002\.png is nearly copy\.png"):
        load_images(data(train, held_out=str(judged), on_leak="refuse"), IMAGES)


def test_nothing_held_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing can be measured"):
        load_images(data(album(tmp_path / "a", 4), held_out_fraction=0.0), IMAGES)


def test_a_mirrored_copy_of_a_held_out_picture_is_a_leak(tmp_path: Path) -> None:
    size = (96, 96)
    train, judged = album(tmp_path / "a", 8, size=size), album(tmp_path / "b", 4, first=30, size=size)
    for number in (1, 4):
        ImageOps.mirror(Image.open(train / f"{number:03}.png")).save(judged / f"m{number}.png")
        (judged / f"m{number}.txt").write_text("x")
    found = load_images(data(train, held_out=str(judged)), IMAGES)
    assert [(one.train, one.evaluated) for one in found.alike] == [("001.png", "m1.png"), ("004.png", "m4.png")]
    assert len(found.train) == 6 and all("mirrored" in one.words for one in found.alike)


def test_a_held_out_picture_that_is_a_test_picture_is_dropped_from_held_out(tmp_path: Path) -> None:
    train, judged, test = (album(tmp_path / name, 4, first=first) for name, first in (("a", 0), ("b", 30), ("c", 60)))
    Image.open(judged / "030.png").save(test / "same.png")
    (test / "same.txt").write_text("x")
    spec = data(train, held_out=str(judged), test=str(test))
    found = load_images(spec, IMAGES)
    assert (len(found.train), len(found.held_out), len(found.test)) == (4, 3, 5)
    assert found.alike[0].action == "dropped from held-out" and found.alike[0].words == "no pixel differs"
    assert len(load_images(replace(spec, on_leak="keep"), IMAGES).held_out) == 4
    with pytest.raises(DataError, match=r"1 held-out pictures are also evaluation pictures \(030\.png is nearly same\.png\)"):
        load_images(replace(spec, on_leak="refuse"), IMAGES)
    for file in test.glob("*"):
        file.unlink()
    for file in judged.glob("*"):
        shutil.copy(file, test)
    with pytest.raises(DataError, match="Every held-out picture is also a test one"):
        load_images(spec, IMAGES)


@pytest.mark.parametrize(("pictures", "held_out"), [(12, 1), (20, 6), (50, 6), (70, 7)])
def test_as_it_comes_the_split_leaves_enough_for_a_verdict(tmp_path: Path, pictures: int, held_out: int) -> None:
    folder = album(tmp_path / "a", pictures)
    found = load_images(DataSpec(train=str(folder)), IMAGES)
    assert (len(found.train), len(found.held_out)) == (pictures - held_out, held_out)
    assert len(load_images(DataSpec(train=str(folder), held_out_fraction=0.2), IMAGES).held_out) == round(pictures * 0.2)


def test_enough_are_counted_without_copies(tmp_path: Path) -> None:
    folder = album(tmp_path / "a", 24, size=(64, 64))
    for number in range(24):
        Image.open(folder / f"{number:03}.png").resize((48, 48)).save(folder / f"{number:03}b.png")
        (folder / f"{number:03}b.txt").write_text("x")
    found = load_images(DataSpec(train=str(folder)), IMAGES)
    assert len({row.source[:3] for row in found.held_out}) == 6 and len(found.held_out) == 12
    groups = evaluation_groups(found.held_out, IMAGES)
    assert groups is not None and len(set(groups)) == 6 and evaluation_groups(found.held_out[:1], IMAGES) is None


def test_a_folder_that_is_not_there_is_named_by_its_setting(tmp_path: Path) -> None:
    folder, gone = album(tmp_path / "a", 8), str(tmp_path / "gone")
    with pytest.raises(DataError, match=r"data\.held_out .*gone is not a folder"):
        load_images(data(folder, held_out=gone), IMAGES)
    with pytest.raises(DataError, match=r"data\.test .*gone is not a folder"):
        load_images(data(folder, test=gone), IMAGES)
    with pytest.raises(DataError, match=r"images\.prior .*gone is not a folder"):
        load_images(data(folder), replace(IMAGES, prior=gone))
