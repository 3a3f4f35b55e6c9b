"""Every kind of picture file: read as it should be seen, or named."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image, features
from pyarrow import parquet

from lorakeet.errors import DataError
from lorakeet.kinds.images.data.folder import (
    bucket_of,
    bucket_sizes,
    crop_to_cover,
    difference_hash_of,
    fit_remarks,
    is_table,
    open_pixels,
    png_of,
    read_album,
    unpack_pictures,
)
from lorakeet.kinds.images.spec import ImageSpec
from tiny.pictures import album, drawn

SPEC = ImageSpec(caption="a thing", smallest=8)


def half(top: tuple[int, int, int] = (200, 0, 0), bottom: tuple[int, int, int] = (0, 0, 200)) -> np.ndarray:
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8], pixels[8:] = top, bottom
    return pixels


def test_captions_from_files_metadata_and_the_setting(tmp_path: Path) -> None:
    folder = album(tmp_path / "photos", 3)
    (folder / "001.txt").unlink()
    (folder / "002.txt").unlink()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "001.png", "text": "from  metadata"}) + "\n\n")
    found = read_album(folder, SPEC)
    assert [row.caption for row in found.rows] == ["red box", "from metadata", "a thing"]
    assert [row.source for row in found.rows] == ["000.png", "001.png", "002.png"] and found.remarks == ()


def test_all_pictures_without_caption_are_named_at_once(tmp_path: Path) -> None:
    folder = album(tmp_path / "photos", 3)
    for name in ("000.txt", "002.txt"):
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"2 problems[\s\S]*000\.png has no caption[\s\S]*002\.png has no caption"):
        read_album(folder, ImageSpec())


def test_metadata_that_cannot_be_used(tmp_path: Path) -> None:
    folder = album(tmp_path / "photos", 1)
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n{"text": "x"}\nnonsense\n[1]\n')
    said = r"gone\.png, which does not exist[\s\S]*:2: it has text[\s\S]*:3: broken JSON[\s\S]*:4: expected an object"
    with pytest.raises(DataError, match=said):
        read_album(folder, SPEC)


def test_broken_tiny_and_doubled_pictures_are_left_out_and_named(tmp_path: Path) -> None:
    folder = album(tmp_path / "photos", 2)
    (folder / "a.png").write_bytes((folder / "000.png").read_bytes()[:200])
    (folder / "b.jpg").write_bytes(b"no picture at all")
    Image.fromarray(half()[:4]).save(folder / "c.png")
    Image.fromarray(drawn(0)[0]).save(folder / "d.bmp")
    found = read_album(folder, SPEC)
    assert [row.source for row in found.rows] == ["000.png", "001.png"]
    said = "\n".join(found.remarks)
    for words in ("a.png cannot be read", "b.jpg cannot be read", "c.png has 24×4 pixels", "d.bmp is a copy of 000.png"):
        assert words in said


def test_files_of_other_formats_are_named_and_jfif_and_avif_are_read(tmp_path: Path) -> None:
    folder = album(tmp_path / "photos", 2)
    Image.fromarray(half()).save(folder / "a.jfif", format="JPEG")
    avif = features.check("avif")
    if avif:
        Image.fromarray(drawn(7)[0]).save(folder / "b.avif")
    for number in range(5):
        (folder / f"IMG_{number}.HEIC").write_bytes(b"x")
    found = read_album(folder, SPEC)
    assert [row.source for row in found.rows] == ["000.png", "001.png", "a.jfif", *(["b.avif"] if avif else [])]
    assert found.remarks == ("5 files (IMG_0.HEIC, IMG_1.HEIC, IMG_2.HEIC, …) are of an unsupported format and left out; "
                             "convert to JPEG or PNG.",)  # fmt: skip
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "IMG_3.HEIC", "text": "x"}))
    with pytest.raises(DataError, match=r"metadata\.jsonl:1: it names IMG_3\.HEIC, of an unsupported format; convert"):
        read_album(folder, SPEC)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "x.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"has no picture.* 1 file \(x\.heic\) is of an unsupported format"):
        read_album(alone, SPEC)


def test_a_blank_caption_beside_the_setting_is_named(tmp_path: Path) -> None:
    folder = album(tmp_path / "photos", 2)
    (folder / "001.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"001\.png has no caption: 001\.txt is blank; write a caption into it, or remove it"):
        read_album(folder, SPEC)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "000.png", "text": ""}))
    with pytest.raises(DataError, match=r"000\.png has no caption: its line in metadata\.jsonl is blank"):
        read_album(folder, SPEC)


def test_pictures_that_are_enlarged_or_cut_much_are_named(tmp_path: Path) -> None:
    sizes = bucket_sizes(128, 16)
    small = read_album(album(tmp_path / "small", 4, size=(50, 50)), SPEC).rows
    long = read_album(album(tmp_path / "long", 1, first=9, size=(100, 900)), SPEC).rows
    enough = read_album(album(tmp_path / "enough", 2, first=20, size=(64, 128)), SPEC).rows
    [soft, lost] = fit_remarks([*small, *long, *enough], sizes)
    assert soft.startswith("4 pictures (000.png 2.6 times, 001.png 2.6 times, 002.png 2.6 times, …) are enlarged more than twice")
    assert lost.startswith("1 picture (009.png keeps 4") and "cropped by more than half" in lost
    assert fit_remarks(enough, sizes) == []


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"None of the 1 pictures[\s\S]*a\.png cannot be read"):
        read_album(tmp_path, SPEC)
    with pytest.raises(DataError, match="not a folder"):
        read_album(tmp_path / "a.png", SPEC)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="has no picture"):
        read_album(tmp_path, SPEC)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(half()).save(tmp_path / "a.png", exif=exif)
    pixels, done = open_pixels(tmp_path / "a.png")
    assert done == ["was rotated upright by its EXIF tag"]
    np.testing.assert_array_equal(pixels, np.rot90(half(), -1))


def test_cmyk_grey_palette_transparent_deep_and_animated(tmp_path: Path) -> None:
    Image.fromarray(half()).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    pixels, done = open_pixels(tmp_path / "cmyk.jpg")
    assert done == ["was converted from CMYK"] and abs(pixels.astype(int) - half()).mean() < 6
    Image.fromarray(half()[..., 0]).save(tmp_path / "grey.png")
    assert open_pixels(tmp_path / "grey.png")[0].shape == (16, 24, 3)
    clear = np.dstack([half(), np.full((16, 24), 255, np.uint8)])
    clear[:8, :, 3] = 0
    Image.fromarray(clear).save(tmp_path / "clear.png")
    pixels, done = open_pixels(tmp_path / "clear.png")
    assert (pixels[:8] == 255).all() and (pixels[8:] == half()[8:]).all() and "put on white" in done[0]
    Image.fromarray(half()[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    pixels, done = open_pixels(tmp_path / "deep.png")
    assert (pixels[..., 0] == half()[..., 0]).all() and "more than 8 bits" in done[0]
    frames = [Image.fromarray(half()), Image.fromarray(half()[::-1].copy())]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    pixels, done = open_pixels(tmp_path / "moving.gif")
    assert "has 2 frames, of which the first is used" in done[0] and pixels[0, 0, 0] > 150


def test_keys_are_those_of_pixels_and_caption(tmp_path: Path) -> None:
    first = read_album(album(tmp_path / "a", 2), SPEC).rows
    other = album(tmp_path / "b", 2)
    (other / "000.png").rename(other / "zzz.png")
    (other / "000.txt").rename(other / "zzz.txt")
    (other / "001.txt").write_text("another")
    second = {row.source: row for row in read_album(other, SPEC).rows}
    assert second["zzz.png"].key == first[0].key
    assert second["001.png"].pixels_key == first[1].pixels_key and second["001.png"].key != first[1].key


def test_cut_covers_and_keeps_the_middle() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    piece, place = crop_to_cover(pixels, (20, 20))
    assert place == (0, 20) and (piece == 255).all()
    enlarged, place = crop_to_cover(pixels, (40, 40))
    assert enlarged.shape == (40, 40, 3) and place == (0, 40)
    others = {crop_to_cover(pixels, (20, 20), crop=number, key="k")[1] for number in range(1, 6)}
    assert len(others) > 1 and all(top == 0 and 0 <= left <= 40 for top, left in others)
    assert crop_to_cover(pixels, (20, 20), crop=3, key="k")[1] == crop_to_cover(pixels, (20, 20), crop=3, key="k")[1]


def test_buckets_have_no_more_pixels_than_the_square_and_fit_the_shape(tmp_path: Path) -> None:
    sizes = bucket_sizes(512, 64)
    assert (512, 512) in sizes and (768, 320) in sizes and all(h * w <= 512 * 512 and h % 64 == w % 64 == 0 for h, w in sizes)
    assert {(w, h) for h, w in sizes if h >= w} >= {(h, w) for h, w in sizes if h < w}
    tall = read_album(album(tmp_path / "tall", 1, size=(96, 48)), SPEC).rows[0]
    height, width = bucket_of(tall, sizes)
    assert 1.8 < height / width < 2.3


def test_looks_survive_small_changes_and_tell_pictures_apart() -> None:
    pixels = drawn(5, size=(64, 64))[0]
    smaller = np.asarray(Image.fromarray(pixels).resize((48, 48), Image.Resampling.LANCZOS))
    assert (difference_hash_of(pixels) ^ difference_hash_of(smaller)).bit_count() <= 8
    assert (difference_hash_of(pixels) ^ difference_hash_of(drawn(6, size=(64, 64))[0])).bit_count() > 40


def test_png_is_the_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_of(half()))
    np.testing.assert_array_equal(open_pixels(tmp_path / "a.png")[0], half())
    (tmp_path / "b.png").write_bytes(png_of(half(), largest=12))
    assert open_pixels(tmp_path / "b.png")[0].shape == (8, 12, 3)


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
