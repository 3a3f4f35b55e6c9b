"""Records are written as they were read: separator, encoding, mark and line ends of a table, fields of JSON lines."""

import csv
import io
from pathlib import Path

import openpyxl
import pytest

from lorakeet.data.predicted.written_records import TableForm, form_like, record_writer, require_written_format
from lorakeet.data.read import read_records
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import RowProblems
from lorakeet.errors import ConfigError


def written(out: Path, form: TableForm, *records: dict[str, object]) -> bytes:
    with record_writer(out, form, list(dict.fromkeys(column for record in records for column in record))) as write:
        for record in records:
            write(record)
    return out.read_bytes()


def test_a_table_keeps_its_form(tmp_path: Path) -> None:
    spec = DataSpec(train="x", encoding="cp1252", delimiter=";")
    (tmp_path / "a.csv").write_bytes("Text;Kind\r\nschön;\r\n".encode("cp1252"))
    form = form_like(str(tmp_path / "a.csv"), spec, tmp_path / "b.csv", ["gut"])
    assert form == TableForm(";", "cp1252", "\r\n")
    found = written(tmp_path / "b.csv", form, {"Text": "schön; ja", "Kind": "gut"}, {"Text": 'a "b"', "Kind": None})
    assert found == 'Text;Kind\r\n"schön; ja";gut\r\n"a ""b""";\r\n'.encode("cp1252")


def test_a_mark_is_kept_and_another_kind_has_its_own_separator(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\nx\n")
    name, spec = str(tmp_path / "a.csv"), DataSpec(train="x", delimiter=";")
    assert form_like(name, spec, tmp_path / "b.csv", ["a"]) == TableForm(";", "utf-8-sig", "\n")
    assert form_like(name, spec, tmp_path / "b.tsv", ["a"]).delimiter == "\t"
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert form_like(str(tmp_path / "a.jsonl"), spec, tmp_path / "b.csv", None) == TableForm()


@pytest.mark.parametrize("texts", [["смех"], None])
def test_what_an_encoding_cannot_write_is_written_in_utf_8_and_said(tmp_path: Path, texts: list[str] | None) -> None:
    (tmp_path / "a.csv").write_bytes("Text\nschön\n".encode("cp1252"))
    form = form_like(str(tmp_path / "a.csv"), DataSpec(train="x", encoding="cp1252"), tmp_path / "b.csv", texts)
    assert form.encoding == "utf-8-sig" and "that cp1252 cannot write" in form.said


def test_json_lines_keep_values(tmp_path: Path) -> None:
    found = written(tmp_path / "a.jsonl", TableForm(), {"a": ["é", 1], "b": None}, {"c": 0.5})
    assert found.decode() == '{"a": ["é", 1], "b": null}\n{"c": 0.5}\n'
    assert written(tmp_path / "a.csv", TableForm(), {"a": ["é", 1]}).decode() == 'a\n"[""é"", 1]"\n'


def test_other_endings_are_refused(tmp_path: Path) -> None:
    require_written_format(tmp_path / "a.CSV")
    with pytest.raises(ConfigError, match=r"ends in '\.ods'; expected one of \.csv, \.tsv, \.xlsx, \.jsonl"):
        require_written_format(tmp_path / "a.ods")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_every_cell_is_read_as_it_was(tmp_path: Path, delimiter: str, line_end: str) -> None:
    cells = ["a\rb", "\r", "\n", "a\r\nb", 'say "a"', '"', "a;b", "a,b", "a\tb", " a ", "=1+1", "", "é\x0b\u2028"]
    records: list[dict[str, object]] = [{"text\r": cell, "b": cell} for cell in cells]
    out = tmp_path / "a.csv"
    raw = written(out, TableForm(delimiter, "utf-8", line_end), *records)
    found = list(csv.reader(io.StringIO(raw.decode(), newline=""), delimiter=delimiter, strict=True))
    assert found == [["text\r", "b"], *([cell, cell] for cell in cells)]
    read = read_records(str(out), RowProblems("a"), DataSpec(delimiter=delimiter))
    assert [record.values for record in read] == records
    assert b'"a\rb"' in raw and b"=1+1" in raw, "quoted as csv.writer of Python 3.13 does; and no sign is added"


def test_a_table_has_the_columns_of_all_records(tmp_path: Path) -> None:
    assert written(tmp_path / "a.csv", TableForm(), {"a": "1"}, {"b": "2", "a": ""}) == b"a,b\n1,\n,2\n"
    assert written(tmp_path / "b.csv", TableForm(), {"a": ""}) == b'a\n""\n', "a row of one empty cell is no empty line"


def test_what_cannot_be_written_is_replaced_or_escaped(tmp_path: Path) -> None:
    with record_writer(tmp_path / "a.csv", TableForm(",", "cp1252"), ["a"]) as write:
        assert write({"a": "schön"}) and not write({"a": "смех!"})
    assert (tmp_path / "a.csv").read_bytes() == "a\nschön\n????!\n".encode("cp1252")
    half = "\ud83d"
    found = written(tmp_path / "a.jsonl", TableForm(), {"é": half}, {"é": "é"})
    assert found == b'{"\\u00e9": "\\ud83d"}\n{"\xc3\xa9": "\xc3\xa9"}\n'


def test_a_workbook_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    """By Lorakeet, and by openpyxl."""
    records = [{"text": 'a <b> & "c"\n_x0041_ \x07 \uffff é', "n": 0.25, "ok": True}, {"text": " =1+1", "n": -3, "ok": None}]
    path = tmp_path / "a.xlsx"
    written(path, TableForm(), *records)
    read = [record.values for record in read_records(str(path), RowProblems("bad"), DataSpec())]
    assert read == records and [type(values["n"]) for values in read] == [float, int]
    book = openpyxl.load_workbook(path)
    assert [[cell.value for cell in row[1:]] for row in book.active.iter_rows()] == [["n", "ok"], [0.25, True], [-3, None]]
    with pytest.raises(ConfigError, match="A cell has 32,768 characters"):
        written(tmp_path / "b.xlsx", TableForm(), {"text": "x" * 32_768})


def test_a_table_has_numbers_in_its_own_form(tmp_path: Path) -> None:
    form = TableForm(";", decimal=",")
    assert written(tmp_path / "a.csv", form, {"a": 0.25, "b": 3, "c": "1.5"}).decode() == "a;b;c\n0,25;3;1.5\n"
    assert written(tmp_path / "b.csv", TableForm(decimal=","), {"a": 0.25}).decode() == 'a\n"0,25"\n'
