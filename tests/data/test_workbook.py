"""Workbooks are read as they are: a sheet's values, rows by their numbers, and files of strangers within stated bounds."""

from __future__ import annotations

import datetime
import re
import resource
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openpyxl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakeet.data.locate import locate_data
from lorakeet.data.read import check_first_record, is_absent, read_records, read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import RowProblems
from lorakeet.data.workbook import MOST_COLUMNS, MOST_ROWS, sheet_names
from lorakeet.errors import LONGEST_MESSAGE, DataError
from lorakeet.registry import first_objective
from tiny.damage import other_folder
from tiny.fuzz import case_folder, fuzzed

MAIN = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
CELLS = "xl/worksheets/sheet1.xml"


def workbook(path: Path, sheets: Mapping[str, Sequence[Sequence[Any]]], change: Callable[[Any], None] | None = None) -> Path:
    """A workbook with these rows in its sheets."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(list(row))
    if change is not None:
        change(book)
    book.save(path)
    return path


def with_part(path: Path, name: str, text: bytes) -> Path:
    """The workbook with another content of one part."""
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, content in {**parts, name: text}.items():
            archive.writestr(part, content)
    return path


def part_of(path: Path, name: str = CELLS) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def records(name: object, spec: DataSpec | None = None) -> list[tuple[str, dict[str, object]]]:
    problems = RowProblems("bad")
    found = [tuple(record) for record in read_records(str(name), problems, spec)]
    problems.raise_if_any()
    return found  # type: ignore[return-value]


def sheet(cells: str) -> bytes:
    return f"<worksheet {MAIN}><sheetData>{cells}</sheetData></worksheet>".encode()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return workbook(tmp_path / "a.xlsx", {"Daten": [["text", "label"], ["one", "A"], ["two", "B"]]})


def test_values_are_those_that_the_sheet_shows(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 1, 31, 10, 30)
    first = ["é\nzwei", 1.5, 17, True, when.date(), when, when.time(), datetime.timedelta(hours=30)]
    second = [None, 0.1 + 0.2, -2.0, False, datetime.date(1900, 1, 15), None, "=1+1", "#N/A"]
    path = workbook(tmp_path / "a.xlsx", {"Daten": [list("abcdefgh"), first, [None] * 8, second]})
    path = with_part(path, CELLS, part_of(path).replace(b"<v></v>", b"<v>2</v>").replace(b"<v />", b"<v>2</v>"))
    shown = [["é\nzwei", 1.5, 17, True, "2024-01-31", "2024-01-31 10:30:00", "10:30:00", "30:00:00"],
             [None, 0.3, -2, False, "1900-01-15", None, 2, None]]  # fmt: skip
    read = records(path)
    assert [source for source, _ in read] == ["a.xlsx:2", "a.xlsx:4"] and [list(values.values()) for _, values in read] == shown
    assert [type(value) for value in read[0][1].values()] == [str, float, int, bool, str, str, str, str]


def test_dates_are_read_by_both_calendars_and_by_formats_of_their_own(tmp_path: Path) -> None:
    def change(book: Any) -> None:
        book.epoch = openpyxl.utils.datetime.CALENDAR_MAC_1904
        for place, form in {"A2": 'dd"."mm"."yyyy', "B2": '0.00" dmy"', "C2": "[Red]0.0", "D2": "[$-407]d. mmmm yyyy"}.items():
            book.active[place].number_format = form

    day = datetime.date(2024, 2, 29)
    path = workbook(tmp_path / "a.xlsx", {"s": [list("abcd"), [day, 45000, 45000.5, day]]}, change)
    assert records(path) == [("a.xlsx:2", {"a": "2024-02-29", "b": 45000, "c": 45000.5, "d": "2024-02-29"})]


def test_rows_of_a_workbook_train_and_are_measured_like_those_of_a_table(tmp_path: Path) -> None:
    rows = [["text", "label"], *([f"row {n}\nwith two lines", n % 2] for n in range(4))]
    book = workbook(tmp_path / "a.xlsx", {"s": rows})
    table = tmp_path / "a.csv"
    table.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows[1:]))
    read = [read_rows(str(path), DataSpec()) for path in (book, table)]
    assert [(row.key, row.source.partition(":")[2]) for row in read[0]] == [
        (row.key, row.source.partition(":")[2]) for row in read[1]
    ]
    assert [row.source for row in read[0]] == [f"a.xlsx:{n}" for n in range(2, 6)]


def test_the_first_sheet_that_is_seen_is_read_or_a_named_one(tmp_path: Path) -> None:
    def hide(book: Any) -> None:
        book["Listen"].sheet_state = "hidden"

    sheets = {name: [["text"], [name]] for name in ("Listen", "März", "a#b!c")}
    path = workbook(tmp_path / "a.xlsx", sheets, hide)
    notes: list[str] = []
    assert read_rows(str(path), DataSpec(), notes)[0].text == "März"
    assert f"has 2 sheets, and 'März' is read. For another one, name it: {path}#a#b!c." in notes[0]
    for name in sheets:
        assert records(f"{path}#{name}") == [("a.xlsx:2", {"text": name})]
    assert sheet_names(locate_data(str(path))) == (["März", "a#b!c"], "März")
    assert sheet_names(locate_data(f"{path}#Listen")) == ([*sheets], "Listen")
    with pytest.raises(DataError, match=r"no sheet 'Marz'; it has 'Listen', 'März', 'a#b!c'. Did you mean 'März'"):
        records(f"{path}#Marz")
    assert not is_absent(f"{path}#März") and is_absent(f"{tmp_path}/b.xlsx#März")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(path, "in/a.xlsx")
    assert records(f"{tmp_path}/z.zip!in/a.xlsx#a#b!c") == [("a.xlsx:2", {"text": "a#b!c"})]


def test_a_header_of_merged_cells_and_values_without_a_name_are_refused(tmp_path: Path) -> None:
    rows = [["Register", None, None], ["text", "label", None], ["one", "A", None]]
    merged = workbook(tmp_path / "a.xlsx", {"s": rows}, lambda book: book.active.merge_cells("A1:C1"))
    with pytest.raises(DataError, match=r"a.xlsx:1: the cells A1:C1 of the header are merged"):
        check_first_record(str(merged), DataSpec())
    below = workbook(tmp_path / "b.xlsx", {"s": [*rows[1:], ["two", "B", None]]}, lambda book: book.active.merge_cells("B2:B3"))
    assert [values["label"] for _, values in records(below)] == ["A", None], "below the header they are empty cells"
    stray = workbook(tmp_path / "c.xlsx", {"s": [["text", "label"], ["one", "A"], ["two", "B", "note"]]})
    with pytest.raises(DataError, match=r"c.xlsx:3: column C has 'note', but the header has no name"):
        records(stray)
    with pytest.raises(DataError, match=r"more than one column 'text'"):
        records(workbook(tmp_path / "d.xlsx", {"s": [["text", "text"], ["one", "A"]]}))


def test_rows_above_the_header_that_are_empty_count(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", {"s": [[None], ["text"], [None], ["one"]]})
    assert records(path) == [("a.xlsx:4", {"text": "one"})]


def test_a_formula_whose_value_is_not_kept_is_named(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", {"s": [["text", "label"], ["one", "A"], ["two", '="B"&"C"']]})
    with pytest.raises(DataError, match=r"a.xlsx:3: column 'label' has a formula whose value the file does not keep"):
        records(path)
    assert [row.text for row in read_rows(str(path), DataSpec(bad_rows="drop"))] == ["one"]


def test_texts_are_read_in_each_way_that_programs_write_them(plain: Path) -> None:
    cells = (
        '<row><c t="inlineStr"><is><r><t>te</t></r><r><t>xt</t></r><rPh><t>x</t></rPh></is></c><c t="str"><v>label</v></c></row>'
        '<row r="7"><c r="A7" t="inlineStr"><is><t>a_x000D_b _x005F_x000D_ _xD83D_</t></is></c>'
        '<c r="B7" t="str"><f>x</f><v></v></c></row>'
    )
    read = records(with_part(plain, CELLS, sheet(cells)))
    assert read == [("a.xlsx:7", {"text": "a\rb _x000D_ _xD83D_", "label": None})]
    prefixed = re.sub(rb"<(/?)", rb"<\1x:", sheet(cells)).replace(b"xmlns=", b"xmlns:x=")
    assert records(with_part(plain, CELLS, prefixed)) == read


BOMBS = {
    "cells of a row": sheet("<row>" + "<c/>" * 4_000_000 + "</row>"),
    "rows": sheet(f'<row r="{MOST_ROWS + 1}"><c><v>1</v></c></row>'),
    "a far column": sheet('<row><c r="ZZZ1"><v>1</v></c></row>'),
    "rows backwards": sheet('<row r="2"/><row r="2"/>'),
    "entities": b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]>' + sheet("<row><c><v>&a;</v></c></row>"),
    "a shared text that is not there": sheet('<row><c t="s"><v>99</v></c></row>'),
    "no number": sheet("<row><c><v>one</v></c></row>"),
    "cut": sheet("<row>")[:-40],
}


@pytest.mark.parametrize("part", BOMBS.values(), ids=list(BOMBS))
def test_a_broken_sheet_ends_in_one_message_and_little_memory(plain: Path, part: bytes) -> None:
    with_part(plain, CELLS, part)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"a.xlsx is damaged"):
        records(plain)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10, "KiB; openpyxl takes 600 MB for 2 million cells of a row"


def test_what_unpacks_to_more_than_the_limit_is_refused(plain: Path, tmp_path: Path) -> None:
    spec = DataSpec(largest_unpacked=1)
    with_part(plain, CELLS, sheet("<row><c><v>1</v></c></row>" + "<row/>" * 200_000))
    with pytest.raises(DataError, match=r"a.xlsx unpacks to more than 1,048,576 bytes"):
        records(plain, spec)
    rows = [["text"], *([f"{n} {'word ' * 10}"] for n in range(20_000))]
    texts = workbook(tmp_path / "b.xlsx", {"s": rows})
    with pytest.raises(DataError, match=r"b.xlsx unpacks to more than 1,048,576 bytes"):
        records(texts, spec)
    with pytest.raises(DataError, match=r"unpacks to more than 16,777,216 bytes"):
        records(with_part(plain, "xl/styles.xml", b"<styleSheet>" + b" " * (17 << 20) + b"</styleSheet>"))


def test_a_long_row_is_a_problem_of_that_row(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", {"s": [["text"], ["x" * 900], ["short"]]})
    problems = RowProblems("bad")
    assert [record.values["text"] for record in read_records(str(path), problems, DataSpec(longest_row=100))] == ["short"]
    assert problems.count == 1 and problems.first.startswith("a.xlsx:2: the row has more than 800 characters")


def test_other_files_of_that_name_are_refused_with_what_to_do(tmp_path: Path) -> None:
    old = tmp_path / "old.xlsx"
    old.write_bytes(b"\xd0\xcf\x11\xe0" + b"\0" * 100)
    with pytest.raises(DataError, match=r"old.xlsx is an old workbook .* or has a password"):
        records(old)
    old.write_bytes(b"text,label\n")
    with pytest.raises(DataError, match=r"old.xlsx is no .xlsx workbook, or damaged"):
        records(old)
    with zipfile.ZipFile(old, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(DataError, match=r"old.xlsx has no sheet with cells"):
        records(old)


def test_the_widest_sheet_is_read_as_openpyxl_reads_it(tmp_path: Path) -> None:
    header = [f"c{n}" for n in range(1, MOST_COLUMNS + 1, 997)]
    path = workbook(tmp_path / "a.xlsx", {"s": [header, [f"v{n}" for n in header], [None, *range(1, len(header))]]})
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    read = [list(row) for row in book.active.iter_rows(min_row=2, values_only=True)]
    book.close()
    assert [list(values.values()) for _, values in records(path)] == read


@cache
def parts() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        rows = [["text", "label", "n"], *([f"row {n}", "ab"[n % 2], datetime.date(2024, 1, n + 1)] for n in range(6))]
        with zipfile.ZipFile(workbook(Path(folder) / "a.xlsx", {"s": rows, "t": [["text"]]})) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
@fuzzed(quick=300, many=20_000)
@given(files=st.deferred(lambda: other_folder(parts())))
def test_damaged_workbooks(files: dict[str, bytes]) -> None:
    with case_folder() as folder:
        path = folder / "a.xlsx"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        try:
            read_rows(str(path), DataSpec(), [], first_objective())
        except DataError as error:
            assert "a.xlsx" in str(error) and len(str(error)) <= LONGEST_MESSAGE
