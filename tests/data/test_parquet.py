"""Parquet files become rows as pyarrow reads them, and a file of few bytes never fills the memory."""

from __future__ import annotations

import zipfile
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lorakeet.data import parquet as reading
from lorakeet.data.locate import locate_data
from lorakeet.data.parquet import parquet_records
from lorakeet.data.parquet_footer import read_footer
from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import RowProblems
from lorakeet.errors import DataError

TABLE = {"text": ["good", "bad"], "label": [1, 0]}
MIB = 1 << 20


def written(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def records(path: Path | str, **limits: int) -> tuple[list[dict[str, object]], RowProblems]:
    problems = RowProblems("x")
    return [record.values for record in parquet_records(locate_data(str(path)), problems, **limits)], problems


def test_parquet_file_and_zip_member(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", TABLE)
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.write(path, "rows.parquet")
    for name in (str(path), f"{tmp_path / 'rows.zip'}!rows.parquet"):
        found = list(parquet_records(locate_data(name), RowProblems("x")))
        assert [record.values for record in found] == [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
        assert found[1].source == "rows.parquet:2"


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"rows.parquet cannot be read as Parquet"):
        records(tmp_path / "rows.parquet")


PLAIN = {
    "text": ["x" * 1000] * 50 + [None],
    "messages": [[{"role": "user", "content": "y" * 500}, {"role": "assistant", "content": str(n)}] for n in range(51)],
    "number": list(range(51)), "yes": [True] * 51, "bytes": [b"abc", None, b""] * 17, "price": [Decimal("1.5")] * 51,
    "map": pyarrow.array([[("k", "v")], None, []] * 17, pyarrow.map_(pyarrow.string(), pyarrow.string())),
    "pair": pyarrow.array([[1.0, 2.0]] * 51, pyarrow.list_(pyarrow.float32(), 2)), "nothing": pyarrow.nulls(51),
    "texts": pyarrow.array([["a", "b"]] * 51, pyarrow.list_(pyarrow.string(), 2)), "lists": [[["a", "b"], [], None]] * 51,
    "two": pyarrow.array([b"ab"] * 51, pyarrow.binary(2)), "large": pyarrow.array(["q"] * 51, pyarrow.large_string()),
    "view": pyarrow.array(["u", "v", None] * 17, pyarrow.string_view()), "at": [datetime(2020, 1, 1, tzinfo=timezone.utc)] * 51,
    "few": pyarrow.array(["u", "v", "u"] * 17).dictionary_encode(),
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_dictionary": False}, {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}}, {"data_page_version": "2.0"},
        {"dictionary_pagesize_limit": 64, "data_page_size": 64},
    ],
)  # fmt: skip
def test_every_column_is_read_as_pyarrow_reads_it(options: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", PLAIN, row_group_size=20, **options)
    found, problems = records(path)
    assert found == parquet.read_table(path).to_pylist() and len(found) == 51 and not problems.count


def shared_text(path: Path, rows: int, size: int, *, nested: bool = False) -> Path:
    """A small file in which one text of `size` bytes is the value of every row."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows), ["x" * size]).cast(pyarrow.string())
    if nested:
        column = pyarrow.ListArray.from_arrays(pyarrow.array(range(rows + 1), pyarrow.int32()), column)
    return written(path, {"text": column}, dictionary_pagesize_limit=4 * size)



@pytest.mark.parametrize("nested", [False, True])
def test_a_text_that_every_row_repeats_stands_once_in_memory(nested: bool, tmp_path: Path) -> None:
    path = shared_text(tmp_path / "a.parquet", 100, MIB, nested=nested)
    assert path.stat().st_size < MIB // 2
    pool = pyarrow.system_memory_pool()  # a pool of its own: its peak is of this test
    before = pyarrow.default_memory_pool()
    seen: list[int] = []
    try:
        own = pyarrow.proxy_memory_pool(pool)
        pyarrow.set_memory_pool(own)
        for _ in parquet_records(locate_data(str(path)), RowProblems("x")):
            seen.append(int(own.max_memory()))
    finally:
        pyarrow.set_memory_pool(before)
    assert len(seen) == 100 and max(seen) < 32 * MIB, "100 MiB of texts"


def test_a_row_that_is_too_long_is_named_and_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", {"text": ["a", "b" * 100, "c", "d" * 101]})
    found, problems = records(path, longest=60)
    assert [row["text"] for row in found] == ["a", "c"] and problems.count == 2
    assert "a.parquet:2: the row has 108 bytes; expected at most 60." in problems.first and "--data.longest_row" in problems.first
    spec = DataSpec(train="x", format="text", longest_row=10, bad_rows="drop")
    dropped: list[str] = []
    assert [row.text for row in read_rows(str(path), spec, dropped)] == ["a", "c"]
    assert "dropped" in dropped[0] and "the row has" in dropped[0]


def test_what_all_rows_unpack_to_is_bounded(tmp_path: Path) -> None:
    path = shared_text(tmp_path / "a.parquet", 100, 10_000)
    assert len(records(path, most=2 * MIB)[0]) == 100
    with pytest.raises(DataError, match=r"unpacks to more than 500,000 bytes.*--data.largest_unpacked"):
        records(path, most=500_000)


def test_a_large_file_may_unpack_to_eight_times_its_size(tmp_path: Path) -> None:
    texts = [f"{number:x}" * 40 for number in range(1000, 2000)]
    path = written(tmp_path / "a.parquet", {"text": texts}, compression="none", use_dictionary=False)
    assert len(records(path, most=1)[0]) == 1000


def test_a_column_that_unpacks_to_too_much_is_never_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.parquet", {"text": ["x" * 4 * MIB]}, compression="zstd")
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **more: pytest.fail("it was read"))
    with pytest.raises(DataError, match="unpacks to more than 1,048,576 bytes"):
        records(path, most=MIB)
    flags = pyarrow.array([[0] * 500_000], pyarrow.list_(pyarrow.int8()))
    many = written(tmp_path / "b.parquet", {"text": flags})
    assert many.stat().st_size < 5000
    with pytest.raises(DataError, match="unpacks to more than"):
        records(many, most=MIB)


def test_texts_that_repeat_the_beginning_of_others_are_read_one_row_at_a_time(tmp_path: Path) -> None:
    texts = ["x" * 50_000 + str(number) for number in range(64)]
    options: dict[str, Any] = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    path = written(tmp_path / "a.parquet", {"text": texts}, **options)
    with path.open("rb") as stream:
        groups = read_footer(stream)
        assert {batch.num_rows for batch in reading._batches(stream, parquet.ParquetFile(path), groups)} == {1}
    assert [row["text"] for row in records(path)[0]] == texts


def test_texts_that_arrow_does_not_keep_shared_are_read_few_rows_at_once(tmp_path: Path) -> None:
    with shared_text(tmp_path / "a.parquet", 64, 4 * MIB).open("rb") as stream:
        assert reading._rows_at_once(stream, read_footer(stream)[0]) == 7
    with written(tmp_path / "b.parquet", {"text": ["a"]}, use_dictionary=False).open("rb") as stream:
        assert reading._rows_at_once(stream, read_footer(stream)[0]) == 1024
