"""A resumed run has the pictures that it began with, whatever its folders and the rules about copies have become."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from lorakeet.data.spec import DataSpec
from lorakeet.errors import ConfigError, DataError
from lorakeet.kinds.images.data import split
from lorakeet.kinds.images.data.record import image_record, recorded_images
from lorakeet.kinds.images.data.split import ImageDataset, load_images
from lorakeet.kinds.images.spec import ImageSpec
from tiny.pictures import album, drawn

IMAGES = ImageSpec(smallest=8, prior_caption="a thing")


def begun(tmp_path: Path, **changes: Any) -> tuple[DataSpec, ImageDataset, dict[str, Any]]:
    """A split of 16 pictures of which one is held out twice, and its record as it stands on disk."""
    folder = album(tmp_path / "photos", 16)
    twin = load_images(DataSpec(train=str(folder), held_out_fraction=0.25), IMAGES, tables=tmp_path).held_out[0]
    Image.open(twin.path).point(lambda value: min(255, value + 3)).save(folder / "twin.png")
    (folder / "twin.txt").write_text(twin.caption)
    spec = DataSpec(**{"train": str(folder), "held_out_fraction": 0.3, **changes})
    found = load_images(spec, IMAGES, tables=tmp_path)
    return spec, found, json.loads(json.dumps(image_record(found, spec)))


def again(record: dict[str, Any], spec: DataSpec, tmp_path: Path, images: ImageSpec = IMAGES) -> ImageDataset | None:
    return recorded_images(record, spec, images, tables=tmp_path, run=Path("runs/one"))


def test_the_same_pictures_come_back_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, found, record = begun(tmp_path)
    assert found.groups is not None and len(set(found.groups)) == len(found.groups) - 1
    folder = Path(spec.train)
    for name, number in (("000-came.png", 50), ("zzz.png", 51)):  # one without a caption, one whose line is none
        Image.fromarray(drawn(number)[0]).save(folder / name)
    (folder / "broken.png").write_bytes(b"none")
    (folder / "metadata.jsonl").write_text('{"file_name": "nowhere.png", "text": "x"}\nnone\n')
    monkeypatch.setattr(split, "duplicate_groups", lambda rows, bits: [0] * len(rows))
    assert again(record, spec, tmp_path) == found
    with pytest.raises(DataError, match="cannot be used"):
        load_images(spec, IMAGES, tables=tmp_path)


def test_a_picture_may_be_renamed_and_a_folder_moved(tmp_path: Path) -> None:
    spec, found, record = begun(tmp_path)
    moved = Path(spec.train).rename(tmp_path / "elsewhere")
    for path in sorted(moved.glob("00[0-3].*")):
        path.rename(path.with_name(f"x{path.name}"))
    back = again(record, replace(spec, train=str(moved)), tmp_path)
    assert back is not None and back.alike == found.alike
    for part in ("train", "held_out"):
        assert [row.key for row in getattr(back, part)] == [row.key for row in getattr(found, part)]
    assert sum(row.source.startswith("x") for row in (*back.train, *back.held_out)) == 4


def test_every_part_comes_from_its_own_folder(tmp_path: Path) -> None:
    kind = album(tmp_path / "kind", 3, first=80)
    for file in kind.glob("*.txt"):
        file.unlink()
    judged, test = album(tmp_path / "judged", 4, first=40), album(tmp_path / "test", 4, first=60)
    Image.open(test / "061.png").save(judged / "same.png")
    (judged / "same.txt").write_text("x")
    images = replace(IMAGES, prior=str(kind))
    spec = DataSpec(train=str(album(tmp_path / "photos", 5)), held_out=str(judged), test=str(test))
    found = load_images(spec, images, tables=tmp_path)
    assert len(found.alike) == 1 and len(found.prior) == 3
    record = json.loads(json.dumps(image_record(found, spec)))
    assert again(record, spec, tmp_path, images) == found
    (judged / "same.png").unlink()  # it was left out when the run began
    assert again(record, spec, tmp_path, images) == found


def test_what_is_gone_or_has_changed_is_named_with_the_remedy(tmp_path: Path) -> None:
    spec, found, record = begun(tmp_path)
    folder, rows = Path(spec.train), found.train
    rows[0].path.unlink()
    Image.fromarray(drawn(70)[0]).save(rows[1].path)
    rows[2].path.with_suffix(".txt").write_text("other words")
    rows[3].path.write_bytes(b"none")
    with pytest.raises(DataError) as error:
        again(record, spec, tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == "The pictures of runs/one have changed since it started (4 problems):"
    assert lines[1:5] == [
        f"  - {folder / rows[0].source} is gone.",
        f"  - {folder / rows[1].source} shows another picture.",
        f"  - The caption of {folder / rows[2].source} was '{rows[2].caption}' and is 'other words'.",
        f"  - {folder / rows[3].source} cannot be used: its picture or its caption cannot be read.",
    ]
    assert lines[5] == "Restore the old pictures, or start a new run with another --out."
    for row in (*found.train, *found.held_out):
        row.path.unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"\(17 problems\):\n(  - .* is gone\.\n){12}  - and 5 more\.\nRestore"):
        again(record, spec, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"held_out_fraction": 0.4}, "data.held_out_fraction was 0.3 when runs/one started and is 0.4 now. Use the old"),
        ({"test": "somewhere"}, "data.test was none when runs/one started and is a folder now."),
        ({"train": "nowhere"}, "data.train nowhere is not a folder"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    spec, _, record = begun(tmp_path)
    with pytest.raises((ConfigError, DataError)) as error:
        again(record, replace(spec, **changes), tmp_path)
    assert said in str(error.value)


def test_a_record_of_a_version_that_had_fewer_settings_of_the_split_is_enough(tmp_path: Path) -> None:
    spec, found, record = begun(tmp_path)
    del record["split_by"]["held_out_minimum"]
    assert again(record, spec, tmp_path) == found


def damaged() -> Iterator[dict[str, Any]]:
    yield {"alike": None}
    yield {"pictures": {"train": []}}
    yield {"pictures": {part: [{"file": "x"}] for part in ("train", "held_out", "test", "prior")}}


def test_a_damaged_record_is_named_and_an_older_one_is_none(tmp_path: Path) -> None:
    spec, _, record = begun(tmp_path)
    for wrong in damaged():
        with pytest.raises(DataError, match=r"split\.json of runs/one cannot be read"):
            again({**record, **wrong}, spec, tmp_path)
    del record["pictures"]
    assert again(record, spec, tmp_path) is None


def test_rows_may_come_to_a_table(tmp_path: Path) -> None:
    """A row before the others too, by which the unpacked files have other names."""
    photos = album(tmp_path / "photos", 9)

    def table(*numbers: int) -> str:
        files = [photos / f"{number:03}.png" for number in numbers]
        pictures = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        captions = [file.with_suffix(".txt").read_text().strip() for file in files]
        parquet.write_table(pyarrow.table({"image": pictures, "text": captions}), tmp_path / "x.parquet")
        return str(tmp_path / "x.parquet")

    spec = DataSpec(train=table(*range(8)), held_out_fraction=0.25)
    found = load_images(spec, IMAGES, tables=tmp_path / "tables")
    record = json.loads(json.dumps(image_record(found, spec)))
    table(8, *range(8))
    back = again(record, spec, tmp_path)
    assert back is not None and [row.key for row in back.train] == [row.key for row in found.train]
    assert [row.key for row in back.held_out] == [row.key for row in found.held_out] and back.train != found.train
    table(*range(1, 8))
    with pytest.raises(DataError, match="shows another picture"):
        again(record, spec, tmp_path)
