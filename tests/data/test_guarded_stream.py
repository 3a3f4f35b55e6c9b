"""Packed files and tables of strangers: rows, or one message that names the file; and never more than the stated size."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import struct
import zipfile
from datetime import datetime, timezone
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from lorakeet.data.locate import locate_data, open_binary
from lorakeet.data.read import read_rows
from lorakeet.data.spec import LONGEST_ROW, DataSpec
from lorakeet.errors import LONGEST_MESSAGE, DataError, LorakeetError
from tiny.fuzz import fuzzed

SPEC = DataSpec(train="x", format="text")
ROWS = [{"text": f"row {number} é", "label": "a"} for number in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
MIB = 1 << 20


def refusal(path: Path, spec: DataSpec = SPEC) -> str:
    with pytest.raises(DataError) as refused:
        read_rows(str(path), spec)
    said = str(refused.value)
    assert path.stem.partition("-")[0] in said and len(said) <= 2000
    return said


def bomb(path: Path, size: int, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """A zip of one member of `size` zeros."""
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("rows.txt", "w", force_zip64=True) as member:
        for _ in range(size // MIB):
            member.write(bytes(MIB))
    return path


def test_a_zip_that_says_that_it_is_too_large_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bomb(tmp_path / "rows.zip", 3 * MIB)
    opened: list[object] = []
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *given: opened.append(given))
    said = refusal(path, DataSpec(train="x", format="text", largest_unpacked=2))
    assert "unpacks to more than 2,097,152 bytes" in said and "--data.largest_unpacked" in said and opened == []


def test_a_zip_that_lies_about_its_size_gives_no_more_than_it_says(tmp_path: Path) -> None:
    path = bomb(tmp_path / "rows.zip", 3 * MIB)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack("<L", 3 * MIB), struct.pack("<L", 1000)))
    with pytest.raises(DataError, match="damaged"), open_binary(locate_data(str(path)), 2 * MIB) as stream:
        while piece := stream.read(MIB):
            assert len(piece) <= 1000


@pytest.mark.parametrize("name", ["rows.txt.gz", "rows.zip"])
def test_gz_is_counted_while_it_is_unpacked(name: str, tmp_path: Path) -> None:
    packed = gzip.compress(bytes(8 * MIB))
    path = tmp_path / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("rows.txt.gz", packed)
    else:
        path.write_bytes(packed)
    taken = 0
    with pytest.raises(DataError, match="unpacks to more than"), open_binary(locate_data(str(path)), 2 * MIB) as stream:
        while piece := stream.read(MIB):
            taken += len(piece)
    assert taken <= 2 * MIB


@pytest.mark.parametrize("ending", ["jsonl", "txt", "csv", "tsv", "json"])
@pytest.mark.parametrize("length", [LONGEST_ROW + 1, 9 * LONGEST_ROW])
def test_a_long_row_is_named_and_can_be_allowed(ending: str, length: int, tmp_path: Path) -> None:
    path, long = tmp_path / f"rows.{ending}", "x" * length
    rows = [{"text": "short"}, {"text": long}, {"text": "last"}]
    if ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text("\n".join((["text"] if ending in ("csv", "tsv") else []) + [row["text"] for row in rows]))
    said = refusal(path)
    assert "--data.longest_row" in said and "characters" in said
    if ending in ("jsonl", "txt") or (ending == "json" and length < 8 * LONGEST_ROW):  # the end of a longer one is not sought
        dropped: list[str] = []
        kept = read_rows(str(path), DataSpec(train="x", format="text", bad_rows="drop"), dropped)
        assert [row.text for row in kept] == ["short", "last"] and "1 row was dropped of the 3" in dropped[0]
    allowed = read_rows(str(path), DataSpec(train="x", format="text", longest_row=length))
    assert [len(row.text) for row in allowed] == [5, length, 4]


def test_of_a_line_without_an_end_a_beginning_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "' + b"x" * (40 * MIB)))
    assert "rows.jsonl.gz:2: the line has more than 8,000,000 characters" in refusal(path)


def packed_with(tmp_path: Path, method: int) -> Path:
    path = tmp_path / f"rows-{method}.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("rows.jsonl", LINES * 50)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_of_every_method_is_one_message(method: int, tmp_path: Path) -> None:
    path = packed_with(tmp_path, method)
    assert len(read_rows(str(path), SPEC)) == 250
    raw, place = path.read_bytes(), path.read_bytes().index(b"rows.jsonl") + 10
    for cut in (b"\xff" * 40, bytes(40)):
        path.write_bytes(raw[:place] + cut + raw[place + 40 :])
        assert refusal(path)


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (10, 97, "unknown way"), (10, 93, "unknown way"), (6, 99, "unknown way"), (8, 1, "encrypted"),
        (24, 0xFFFFFFFF, "unpacks to more"),
    ],
)
def test_unknown_methods_and_versions_are_named(offset: int, value: int, words: str, tmp_path: Path) -> None:
    path = packed_with(tmp_path, zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"PK\x01\x02")
    size = 4 if value > 0xFFFF else 2
    raw[entry + offset : entry + offset + size] = value.to_bytes(size, "little")
    path.write_bytes(bytes(raw))
    assert words in refusal(path)


def table(path: Path, column: pyarrow.Array) -> Path:
    parquet.write_table(pyarrow.table({"text": column}), path)
    return path


def test_values_that_are_none_in_python_are_one_message(tmp_path: Path) -> None:
    not_text = pyarrow.Array.from_buffers(pyarrow.utf8(), 1, pyarrow.array([b"\xff\xfe"], pyarrow.binary()).buffers())
    assert "UnicodeDecodeError" in refusal(table(tmp_path / "a.parquet", not_text))
    late = pyarrow.array([2**62], pyarrow.timestamp("us", "UTC"))
    assert "cannot be read as Parquet" in refusal(table(tmp_path / "b.parquet", late))
    fine = pyarrow.array([datetime(2020, 1, 1, tzinfo=timezone.utc)])
    assert "b" in refusal(table(tmp_path / "b.parquet", fine)), "a date is no text"
    wide = pyarrow.array([10**37], pyarrow.decimal128(38))
    assert refusal(table(tmp_path / "c.parquet", wide))


def seeds(folder: Path) -> dict[str, bytes]:
    """Small files of every kind."""
    found = {"a.jsonl": LINES, "a.json": json.dumps(ROWS).encode(), "a.txt": LINES, "a.jsonl.gz": gzip.compress(LINES)}
    text = io.StringIO()
    writer = csv.DictWriter(text, ["text", "label"])
    writer.writeheader()
    writer.writerows(ROWS)
    found["a.csv"] = text.getvalue().encode()
    found["a.tsv"] = text.getvalue().replace(",", "\t").encode()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        found[f"a{method}.zip"] = packed_with(folder, method).read_bytes()
    for compression in ("none", "snappy", "zstd"):
        at = folder / "seed.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([{**row, "n": 1, "at": datetime(2020, 1, 1)} for row in ROWS]), at,
                            compression=compression)  # fmt: skip
        found[f"a-{compression}.parquet"] = at.read_bytes()
    return found


PIECES = (
    b"\xff", b"\x00", b"\xef\xbb\xbf", b'"', b"'", b"\n", b"\r", b"{", b"[" * 300, b"\\ud800", b"1e999", b"9" * 5000, b"NaN",
    b"\xff\xff\xff\x7f", b"\x80\x00\x00\x00", b"PK\x03\x04", b"PAR1", b"\x1f\x8b\x08", b"null", b',"text":5', b",,,",
    b'"text":["x"]', b"\xc3",
)  # fmt: skip


def mutated(seed: int, files: dict[str, bytes]) -> tuple[str, bytes]:
    """A file of some kind with pieces put in, cut out, copied or changed."""
    draw = random.Random(seed)
    name = draw.choice(sorted(files))
    raw = bytearray(files[name])
    for _ in range(draw.randint(1, 4)):
        at, end = sorted((draw.randint(0, len(raw)), draw.randint(0, len(raw))))
        kind = draw.randrange(4)
        if kind == 0:
            raw[at:at] = draw.choice(PIECES)
        elif kind == 1 and end - at < len(raw) // 2:
            del raw[at:end]
        elif kind == 2 and raw:
            raw[min(at, len(raw) - 1)] ^= 1 << draw.randrange(8)
        else:
            raw[at : at + 4] = draw.choice(PIECES)[:4]
    return name, bytes(raw)


FILES: dict[str, bytes] = {}


@pytest.mark.slow
@fuzzed(500, 50_000)
@given(seed=st.integers(0, 2**48))
def test_any_data_file_is_rows_or_one_message(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    if not FILES:
        FILES.update(seeds(tmp_path_factory.mktemp("seeds")))
        FILES["place"] = str(tmp_path_factory.mktemp("mutated")).encode()
    name, raw = mutated(seed, {key: value for key, value in FILES.items() if key != "place"})
    path = Path(FILES["place"].decode()) / name
    path.write_bytes(raw)
    try:
        rows = read_rows(str(path), SPEC)
        assert all(row.key and row.text is not None for row in rows)
    except LorakeetError as error:
        assert len(str(error)) <= LONGEST_MESSAGE
