"""What is known of a file before it is answered: all of its columns, what a table cannot have, and that it can be read twice."""

import os
from pathlib import Path

import pytest

from lorakeet.data.predicted.contents import Contents, require_rereadable
from lorakeet.data.predicted.written_records import TableForm
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.errors import DataError


def contents(form: TableForm, out: str, *records: dict[str, object]) -> tuple[Contents, RowProblems]:
    problems = RowProblems("f")
    found = Contents(form, Path(out), problems)
    for number, values in enumerate(records, start=1):
        found.add(FileRecord(f"f:{number}", values))
    return found, problems


def test_columns_are_those_of_all_records() -> None:
    found, problems = contents(TableForm(), "o.csv", {"a": 1}, {"b": 2, "a": 3}, {"c": None})
    assert list(found.columns) == ["a", "b", "c"] and found.fits and not problems.count


def test_what_an_encoding_cannot_write_is_known() -> None:
    western = TableForm(",", "cp1252")
    assert contents(western, "o.csv", {"a": "schön"})[0].fits
    assert not contents(western, "o.csv", {"a": "x"}, {"a": ["смех"]})[0].fits
    assert not contents(western, "o.csv", {"标签": "x"})[0].fits
    assert contents(TableForm(), "o.jsonl", {"标签": "x"})[0].fits


def test_half_of_a_character_is_named_for_a_table_alone() -> None:
    for record in ({"a": "x", "b": "y\ud83d"}, {"b": "x"} | {"b\ud83d": 1}):
        found, problems = contents(TableForm(), "o.csv", {"a": "x"}, record)
        assert found.fits and problems.count == 1
        assert problems.first.startswith("f:2: column 'b") and "half of a character, which no table can have" in problems.first
        assert not contents(TableForm(), "o.jsonl", record)[1].count


def test_a_pipe_is_refused_without_reading_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.csv")
    (tmp_path / "link.csv").symlink_to("p.csv")
    os.mkfifo(tmp_path / "p.zip")
    for name in ("-", "/dev/null", *(f"{tmp_path}/{one}" for one in ("p.csv", "link.csv", "p.zip", "p.zip!a.csv"))):
        with pytest.raises(DataError, match="is a pipe or a device; expected a regular file"):
            require_rereadable(name)
    (tmp_path / "a.csv").write_text("text\n")
    for name in (f"{tmp_path}/a.csv", str(tmp_path), f"{tmp_path}#train", "owner/rows", "hub:owner/rows"):
        require_rereadable(name)
    with pytest.raises(DataError, match="does not exist"):
        require_rereadable(f"{tmp_path}/b.csv")
