"""Reads a sheet of an .xlsx workbook (ECMA-376, SpreadsheetML), cell by cell: a file of few bytes never fills the memory.

Values are those that the file keeps of formulas. Dates are texts as ISO 8601 writes them, and errors as #N/A are empty cells.
"""

from __future__ import annotations

import datetime
import math
import posixpath
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple
from xml.parsers import expat

from lorakeet.data.guarded_stream import MOST_UNPACKED, too_large, unpacking
from lorakeet.data.locate import WORKBOOKS, Location, locate_data, open_binary
from lorakeet.data.spec import LONGEST_ROW
from lorakeet.data.tables import FileRecord, RowProblems, refuse_equal_columns, row_place
from lorakeet.errors import DataError, nearest, spelt

MOST_ROWS, MOST_COLUMNS = 1 << 20, 1 << 14  # of a sheet, in Excel
_PIECE = 1 << 16  # bytes
_SMALL = 16 << 20  # bytes of a part that is not cells or their texts
_NO_ZIP = b"\xd0\xcf\x11\xe0"  # the beginning of an .xls file, and of a workbook with a password
_DATES = {*range(14, 23), *range(27, 37), *range(45, 48), *range(50, 59)}  # numbers of built-in formats of dates and times
_DURATION = 46  # the built-in format of hours beyond 24
_NOT_DATE = re.compile(r'"[^"]*"|\\.|_.|\*.|\[(?![hms]+\])[^\]]*\]', re.IGNORECASE)  # of a format what is no code of a date
_ELAPSED = re.compile(r"\[[hms]+\]", re.IGNORECASE)
_ESCAPE = re.compile(r"_x([0-9A-Fa-f]{4})_")
_MERGED = re.compile(rb'mergeCell [^>]*?ref="([A-Z]+(\d+):[A-Z]+(\d+))"')
_CELL = re.compile(r"([A-Z]{1,3})\d*")
_FIRST_DAYS = (datetime.datetime(1899, 12, 30), datetime.datetime(1904, 1, 1))  # by date1904
_FALSE_LEAP_DAY = 60  # 29 February 1900, which was none; days before it are one more


class Sheet(NamedTuple):
    """A sheet of a workbook, and the part of the file that has its cells."""

    name: str
    part: str
    hidden: bool


def sheet_names(location: Location) -> tuple[list[str], str]:
    """The names of all sheets that a reader sees, and which one `location` means. DataError as of `workbook_records`."""
    with _opened(location, MOST_UNPACKED) as book:
        chosen = book.chosen(location.sheet).name
        return [sheet.name for sheet in book.sheets if not sheet.hidden or sheet.name == chosen], chosen


def sheets_note(name: str) -> str:
    """A sentence where a workbook has several sheets and none is named; else an empty string."""
    if not name.lower().endswith(WORKBOOKS):
        return ""
    names, chosen = sheet_names(locate_data(name))
    others = ", ".join(f"{name}#{other}" for other in names[:9] if other != chosen)
    return f"{name} has {len(names)} sheets, and {chosen!r} is read. For another one, name it: {others}." if others else ""


def workbook_records(
    location: Location, problems: RowProblems, most: int = MOST_UNPACKED, longest: int = 8 * LONGEST_ROW
) -> Iterator[FileRecord]:
    """Yields the rows of a sheet below its header; rows of more than `longest` characters are added to `problems`.

    DataError for a damaged file, one that unpacks to more than `most` bytes, a header of merged cells or equal names, and values
    below no name.
    """
    name = location.name.rsplit("/", 1)[-1]
    header: dict[int, str] = {}
    with _opened(location, most) as book:
        part = book.chosen(location.sheet).part
        merged = book.merged_rows(part)
        for row in book.rows(part, longest):
            source = row_place(name, row.number)
            if not header and row.cells:
                header = {column: str(value) for column, value in row.cells.items()}
                if cells := next((cells for cells, (first, last) in merged.items() if first <= row.number <= last), ""):
                    raise DataError(
                        f"{source}: the cells {cells} of the header are merged; expected one name above each column. Take the "
                        "cells apart in a spreadsheet program (unmerge), and remove rows above the names."
                    )
                refuse_equal_columns(list(header.values()), name)
            elif row.size > longest or not header:
                problems.add(source, f"the row has more than {longest:,} characters; shorten or remove it, or raise "
                             f"{spelt('data.longest_row')} (a row of a workbook may have 8 times as many).")  # fmt: skip
            elif stray := sorted(row.cells.keys() - header.keys()):
                raise DataError(
                    f"{source}: column {_letters(stray[0])} has {row.cells[stray[0]]!r:.60}, but the header has no name for it. "
                    "Name the column there (of merged cells only the first has a name), or clear the cell."
                )
            elif row.uncounted:
                column = header.get(row.uncounted[0], _letters(row.uncounted[0]))
                problems.add(source, f"column {column!r} has a formula whose value the file does not keep; open the file in a "
                             "spreadsheet program and save it.")  # fmt: skip
            else:
                yield FileRecord(source, {column: row.cells.get(place) for place, column in header.items()})


@contextmanager
def _opened(location: Location, most: int) -> Iterator[_Workbook]:
    with open_binary(location, most) as stream, unpacking(location.path):
        beginning = stream.peek(4)[:4]
        if beginning[:2] != b"PK":
            what = "is an old workbook (.xls) or has a password" if beginning == _NO_ZIP else "is no .xlsx workbook, or damaged"
            raise DataError(f"{location.name} {what}. Open it in a spreadsheet program, and save it as .xlsx without a password.")
        with zipfile.ZipFile(stream) as archive:
            yield _Workbook(location.path, archive, most)


class _Tags:
    """Takes the elements of a part that has no texts."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Mapping[str, str]]] = []

    def start(self, tag: str, given: Mapping[str, str]) -> None:
        self.found.append((tag, given))

    def end(self, tag: str) -> None:
        pass

    def said(self, text: str) -> None:
        pass


class _Texts(_Tags):
    """Takes the texts that cells share. Together they take at most `most` bytes of memory."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.bytes, self.size = 0, 0
        self._most = most
        self._pieces: list[str] = []
        self._phonetic, self._within = 0, False

    def start(self, tag: str, given: Mapping[str, str]) -> None:
        self._phonetic += tag == "rPh"
        self._within = tag in ("t", "v") and not self._phonetic

    def end(self, tag: str) -> None:
        self._phonetic -= tag == "rPh"
        self._within = False
        if tag == "si":
            self.texts.append(self.taken())
            self.bytes += sys.getsizeof(self.texts[-1]) + 8

    def said(self, text: str) -> None:
        if self._within:
            self.size += len(text)
            if self.size <= self._most:  # of a longer row no more is kept
                self._pieces.append(text)

    def taken(self) -> str:
        """What was said since the last call. What XML cannot have is written as _x0007_; halves of characters stay so."""
        text, self._pieces = "".join(self._pieces), []
        if "_x" not in text:
            return text
        return _ESCAPE.sub(lambda found: chr(code) if not 0xD800 <= (code := int(found[1], 16)) < 0xE000 else found[0], text)


@dataclass
class _SheetRow:
    """A row that has a value or a formula: its number, its values by column from 1 on, and columns of formulas without one."""

    number: int
    cells: dict[int, object] = field(default_factory=dict)
    uncounted: list[int] = field(default_factory=list)
    size: int = 0  # characters


class _Cells(_Texts):
    """Takes the cells of a sheet, and makes rows of them. Of a row at most `most` characters are kept."""

    def __init__(self, first_day: datetime.datetime, dates: Mapping[int, bool], texts: Sequence[str], most: int) -> None:
        super().__init__(most)
        self._first_day, self._dates, self._shared = first_day, dates, texts
        self._row, self._column = _SheetRow(0), 0
        self._about: Mapping[str, str] = {}
        self._formula = False
        self.rows: list[_SheetRow] = []  # that have ended

    def start(self, tag: str, given: Mapping[str, str]) -> None:
        super().start(tag, given)
        if tag == "row":
            number = int(given.get("r", self._row.number + 1))
            if not self._row.number < number <= MOST_ROWS:
                raise ValueError(f"row {number:,} after row {self._row.number:,}, of at most {MOST_ROWS:,}")
            self._row, self._column, self.size = _SheetRow(number), 0, 0
        elif tag == "c":
            place = _CELL.match(given.get("r", ""))
            column = _number(place[1]) if place else self._column + 1
            if not self._column < column <= MOST_COLUMNS:
                raise ValueError(f"column {column:,} after column {self._column:,}, of at most {MOST_COLUMNS:,}")
            self._column, self._about, self._formula = column, given, False
        elif tag == "f":
            self._formula = True

    def end(self, tag: str) -> None:
        super().end(tag)
        if tag == "c":
            kind, text = self._about.get("t", "n"), self.taken()
            value = self._value(kind, text) if text else None
            if value is not None:
                self._row.cells[self._column] = value
            elif self._formula and not text and kind != "str":  # an empty text is the value of such a formula
                self._row.uncounted.append(self._column)
        elif tag == "row" and (self._row.cells or self._row.uncounted or self.size):
            self._row.size = self.size
            self.rows.append(self._row)

    def _value(self, kind: str, text: str) -> object:
        if kind == "s":
            self.size += len(self._shared[int(text)])
            return self._shared[int(text)] or None
        if kind == "b":
            return text.strip() == "1"
        if kind != "n":
            return None if kind == "e" else text
        number = float(f"{float(text):.15g}")  # as many digits as a spreadsheet shows
        if not math.isfinite(number):
            return None
        style = int(self._about.get("s", 0))
        if style in self._dates:
            return _moment(number, self._first_day, self._dates[style])
        return int(number) if number.is_integer() else number


class _Workbook:
    """The parts of an open workbook."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, most: int) -> None:
        self._path, self._archive, self._most = path, archive, most
        main = next(iter(self._targets("", "/officeDocument").values()), "xl/workbook.xml")
        parts = self._targets(main, "/worksheet")
        self._strings, self._styles = (
            next(iter(self._targets(main, kind).values()), "") for kind in ("/sharedStrings", "/styles")
        )
        self._first_day = _FIRST_DAYS[0]
        self.sheets: list[Sheet] = []
        for tag, given in self._elements(main):
            if tag == "workbookPr":
                self._first_day = _FIRST_DAYS[given.get("date1904") in ("1", "true")]
            elif tag == "sheet" and (part := parts.get(given.get("id", ""))):
                self.sheets.append(Sheet(given.get("name", ""), part, given.get("state", "visible") != "visible"))

    def chosen(self, name: str) -> Sheet:
        """The sheet `name`, or the first that is not hidden. DataError for none."""
        known = [sheet for sheet in self.sheets if not name or sheet.name == name]
        if not known:
            names = [sheet.name for sheet in self.sheets]
            said = f"{name!r}; it has {', '.join(map(repr, names[:20]))}.{nearest(name, names)}" if names else "with cells."
            raise DataError(f"{self._path.name} has no sheet {said}")
        return min(known, key=lambda sheet: sheet.hidden)

    def merged_rows(self, part: str) -> dict[str, tuple[int, int]]:
        """The merged cells of a sheet, each with its first and last row; they stand behind all cells."""
        found, before = dict[str, tuple[int, int]](), b""
        with self._opened(part, self._most) as stream:
            while (piece := stream.read(_PIECE)) and len(found) < MOST_COLUMNS:
                for cells, top, bottom in _MERGED.findall(before + piece):
                    found[cells.decode()] = int(top[:9]), int(bottom[:9])
                before = piece[-200:]
        return found

    def rows(self, part: str, longest: int) -> Iterator[_SheetRow]:
        """The rows of a sheet that have a value, in order."""
        texts = _Texts(self._most)
        for _ in self._pieces(self._strings, texts, self._most):
            if texts.bytes > self._most:
                raise too_large(self._path, self._most)
        cells = _Cells(self._first_day, self._date_styles(), texts.texts, longest)
        for _ in self._pieces(part, cells, self._most):
            yield from cells.rows
            cells.rows.clear()

    def _date_styles(self) -> dict[int, bool]:
        """The numbers of the cell styles that show a date or a time, each with whether it is a duration."""
        formats: dict[int, str] = {}
        found: dict[int, bool] = {}
        of_cells, count = False, 0
        for tag, given in self._elements(self._styles):
            if tag == "numFmt":
                formats[int(given.get("numFmtId", 0))] = given.get("formatCode", "")[:255]
            elif tag in ("cellStyleXfs", "cellXfs"):
                of_cells = tag == "cellXfs"
            elif tag == "xf" and of_cells:
                number = int(given.get("numFmtId", 0))
                code = _NOT_DATE.sub("", formats.get(number, "d" if number in _DATES else ""))
                if re.search("[dmyhs]", code, re.IGNORECASE):
                    found[count] = number == _DURATION or bool(_ELAPSED.search(code))
                count += 1
        return found

    def _targets(self, part: str, kind: str) -> dict[str, str]:
        """The parts that `part` names with a relation whose type ends in `kind`, by id."""
        folder, name = posixpath.split(part)
        return {
            given.get("Id", ""): posixpath.normpath(posixpath.join("/", folder, given.get("Target", "")))[1:]
            for tag, given in self._elements(posixpath.join(folder, "_rels", f"{name}.rels"))
            if tag == "Relationship" and given.get("Type", "").endswith(kind)
        }

    def _elements(self, part: str) -> Iterator[tuple[str, Mapping[str, str]]]:
        """The elements of a small part, with what stands in their tags; none where the file has no such part."""
        tags = _Tags()
        for _ in self._pieces(part, tags, _SMALL):
            yield from tags.found
            tags.found.clear()

    def _pieces(self, part: str, taker: _Tags, most: int) -> Iterator[None]:
        """Gives a part to `taker`, names without their namespaces; yields after each piece of it."""
        if part not in self._archive.NameToInfo:
            return
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = _refuse_entities
        parser.StartElementHandler = lambda tag, given: taker.start(_local(tag), {_local(key): given[key] for key in given})
        parser.EndElementHandler = lambda tag: taker.end(_local(tag))
        parser.CharacterDataHandler = taker.said
        with self._opened(part, most) as stream:
            while piece := stream.read(_PIECE):
                parser.Parse(piece, False)
                yield
            parser.Parse(b"", True)
            yield

    def _opened(self, part: str, most: int) -> IO[bytes]:
        about = self._archive.getinfo(part)
        if about.file_size > most:  # zipfile reads no more than it says here
            raise too_large(self._path, most)
        return self._archive.open(about)


def _moment(days: float, first_day: datetime.datetime, elapsed: bool) -> object:
    """A date, a date with its time, a time alone or a duration; the number itself where no calendar has it."""
    seconds = round(days * 86400)
    if elapsed or 0 <= days < 1:
        return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}" if days >= 0 else days
    try:
        early = days < _FALSE_LEAP_DAY and first_day == _FIRST_DAYS[0]
        moment = first_day + datetime.timedelta(days=int(early), seconds=seconds)
    except OverflowError:
        return days
    return moment.date().isoformat() if seconds % 86400 == 0 else moment.isoformat(" ")


def _refuse_entities(*_: object) -> None:
    raise ValueError("it declares a document type, which no workbook does")


def _local(tag: str) -> str:
    return tag.rpartition(":")[2]


def _number(letters: str) -> int:
    """The number of a column: A is 1, AA is 27."""
    return sum((ord(letter) - 64) * 26**place for place, letter in enumerate(reversed(letters)))


def _letters(number: int) -> str:
    """The letters of a column: 1 is A, 27 is AA."""
    return _letters((number - 1) // 26) + chr(65 + (number - 1) % 26) if number else ""
