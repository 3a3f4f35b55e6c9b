"""Pictures in Parquet files and data sets are the pictures that were put there."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from lorakeet.data.images.folder import read_album
from lorakeet.data.images.spec import ImageSpec
from lorakeet.data.images.tables import is_table, unpack_pictures
from lorakeet.errors import DataError
from tiny.pictures import album

IMAGES = ImageSpec(smallest=8, caption="a thing")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return album(tmp_path / "photos", 4)


def table_of(photos: Path, path: Path, column: str = "caption") -> Path:
    files = sorted(photos.glob("*.png"))
    captions = [file.with_suffix(".txt").read_text().strip() for file in files]
    pictures = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    parquet.write_table(pyarrow.table({"id": list(range(len(files))), "image": pictures, column: captions}), path)
    return path


def test_a_parquet_file_holds_the_pictures_of_the_folder(photos: Path, tmp_path: Path) -> None:
    wanted = read_album(photos, IMAGES).rows
    path = table_of(photos, tmp_path / "x.parquet")
    folder = unpack_pictures(str(path), tmp_path / "tables")
    assert [row.key for row in read_album(folder, IMAGES).rows] == [row.key for row in wanted]
    assert unpack_pictures(str(path), tmp_path / "tables") == folder and [folder] == list((tmp_path / "tables").iterdir())
    assert len(read_album(unpack_pictures(str(path), tmp_path / "tables", limit=2), IMAGES).rows) == 2
    other = table_of(photos, tmp_path / "y.parquet", column="title")
    rows = read_album(unpack_pictures(str(other), tmp_path / "tables"), IMAGES).rows
    assert {row.caption for row in rows} == {"a thing"} and [row.pixels_key for row in rows] == [row.pixels_key for row in wanted]


def test_a_saved_data_set_holds_them_too(photos: Path, tmp_path: Path) -> None:
    wanted = read_album(photos, IMAGES).rows
    files = sorted(photos.glob("*.png"))
    captions = [file.with_suffix(".txt").read_text().strip() for file in files]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": [str(file) for file in files], "text": captions}, features=features)
    made.save_to_disk(str(tmp_path / "set"))
    assert is_table(str(tmp_path / "set"))
    rows = read_album(unpack_pictures(str(tmp_path / "set"), tmp_path / "tables"), IMAGES).rows
    assert [row.key for row in rows] == [row.key for row in wanted]


def test_what_is_a_table(photos: Path, tmp_path: Path) -> None:
    assert not is_table(str(photos)) and is_table("x.parquet") and is_table("hub:a/b") and is_table(f"{photos}#train")
    assert not is_table(str(tmp_path / "nowhere" / "photos"))


def test_rows_without_pictures_are_named(photos: Path, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match=r"text\.parquet:1 has no picture in text"):
        unpack_pictures(str(tmp_path / "text.parquet"), tmp_path / "tables")
    files = sorted(photos.glob("*.png"))
    pictures = [{"bytes": files[0].read_bytes(), "path": None}, {"bytes": None, "path": "gone.png"}]
    parquet.write_table(pyarrow.table({"image": pictures}), tmp_path / "half.parquet")
    with pytest.raises(DataError, match=r"half\.parquet:2: no picture in the column image"):
        unpack_pictures(str(tmp_path / "half.parquet"), tmp_path / "tables")
