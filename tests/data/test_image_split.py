"""The split depends on content alone, and copies never stand on both sides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorakeet.data import image_split
from lorakeet.data.image_spec import ImageSpec
from lorakeet.data.image_split import ImageDataset, alike_groups, distances
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError
from tiny.pictures import album, drawn

IMAGES = ImageSpec(smallest=8)


def data(folder: Path, **changes: object) -> DataSpec:
    return DataSpec(**{"train": str(folder), "held_out_fraction": 0.25, **changes})  # type: ignore[arg-type]


def load_images(spec: DataSpec, images: ImageSpec) -> ImageDataset:
    return image_split.load_images(spec, images, tables=Path(spec.train).parent / "tables")


def test_pictures_of_the_kind_have_a_caption_and_are_not_judged_by(tmp_path: Path) -> None:
    train, kind = album(tmp_path / "a", 8), album(tmp_path / "kind", 5, first=30)
    for file in kind.glob("*.txt"):
        file.unlink()
    judged = load_images(data(train), IMAGES).held_out[0]
    Image.open(judged.path).save(kind / "judged.png")
    found = load_images(data(train), replace(IMAGES, prior=str(kind), prior_caption="a thing"))
    assert len(found.prior) == 5 and {row.caption for row in found.prior} == {"a thing"}
    assert [(one.train.source, one.judged.source) for one in found.alike] == [("judged.png", judged.source)]
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
    assert [(one.train.source, one.judged.source) for one in found.alike] == [("002.png", "copy.png")]
    assert ("kept" in found.alike[0].action) == (on_leak == "keep")
    with pytest.raises(DataError, match=r"002\.png is nearly copy\.png"):
        load_images(data(train, held_out=str(judged), on_leak="refuse"), IMAGES)


def test_nothing_held_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing could be proved"):
        load_images(data(album(tmp_path / "a", 4), held_out_fraction=0.0), IMAGES)


def test_distances_and_groups() -> None:
    hashes = [0, 0b111, 0b111 << 100, (1 << 256) - 1, 0b11111 << 100]
    assert distances([0], hashes).tolist() == [[0, 3, 3, 256, 5]]
    groups = alike_groups(hashes, 3)
    assert groups[0] == groups[1] == groups[2] == groups[4] != groups[3]
    assert len(set(alike_groups(hashes, 1))) == 5
