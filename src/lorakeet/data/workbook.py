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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple
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
_NOT_DATE = re.compile(r'"[^"]*"|\\.|_.|\*.|\[(?![hms]+\])[^\]]*\]', re.IGNORECASE)  # of a format what is no code of a date
_ELAPSED = re.compile(r"\[[hms]+\]", re.IGNORECASE)
_ESCAPE = re.compile(r"_x([0-9A-Fa-f]{4})_")
_MERGED = re.compile(rb'mergeCell [^>]*?ref="([A-Z]+)(\d+):([A-Z]+)(\d+)"')
_CELL = re.compile(r"([A-Z]{1,3})(\d*)")
_FIRST_DAYS = {False: datetime.datetime(1899, 12, 30), True: datetime.datetime(1904, 1, 1)}  # by date1904
_FALSE_LEAP_DAY = 60  # 29 February 1900, which was none; days before it are one more

Elements = Callable[[str, Mapping[str, str]], None]


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
        sheet = book.chosen(location.sheet)
        dates, texts = book.date_styles(), book.texts()
        merged = book.merged(sheet.part)
        for row in book.rows(sheet.part, dates, texts, longest):
            source = row_place(name, row.number)
            if not header and row.cells:
                header = {column: str(value) for column, value in row.cells.items()}
                _require_header(header, row.number, merged, name)
                continue
            if row.size > longest or not header:
                problems.add(source, f"the row has more than {longest:,} characters; shorten or remove it, or raise "
                             f"{spelt('data.longest_row')} (a row of a workbook may have 8 times as many).")  # fmt: skip
                continue
            if stray := sorted(row.cells.keys() - header.keys()):
                raise DataError(
                    f"{source}: column {_letters(stray[0])} has {row.cells[stray[0]]!r:.60}, but the header has no name for it. "
                    "Name the column there (of merged cells only the first has a name), or clear the cell."
                )
            if row.uncounted:
                missing = header.get(row.uncounted[0], _letters(row.uncounted[0]))
                problems.add(source, f"column {missing!r} has a formula whose value the file does not keep; open the file in a "
                             "spreadsheet program and save it.")  # fmt: skip
                continue
            yield FileRecord(source, {column: row.cells.get(place) for place, column in header.items()})


def _require_header(header: Mapping[int, str], number: int, merged: Sequence[tuple[str, int, int]], name: str) -> None:
    for cells, first, last in merged:
        if first <= number <= last:
            raise DataError(
                f"{row_place(name, number)}: the cells {cells} of the header are merged; expected one name above each column. "
                "Take the cells apart in a spreadsheet program (unmerge), and remove rows above the names."
            )
    refuse_equal_columns(list(header.values()), name)


@contextmanager
def _opened(location: Location, most: int) -> Iterator[_Workbook]:
    with open_binary(location, most) as stream, unpacking(location.path):
        beginning = stream.peek(4)[:4]
        if beginning[:2] != b"PK":
            what = "is an old workbook (.xls) or has a password" if beginning == _NO_ZIP else "is no .xlsx workbook, or damaged"
            raise DataError(f"{location.name} {what}. Open it in a spreadsheet program, and save it as .xlsx without a password.")
        with zipfile.ZipFile(stream) as archive:
            yield _Workbook(location, archive, most)


@dataclass
class _SheetRow:
    """A row that has a value or a formula: its number, its values by column from 1 on, and columns of formulas without one."""

    number: int
    cells: dict[int, object] = field(default_factory=dict)
    uncounted: list[int] = field(default_factory=list)
    size: int = 0  # characters


class _Workbook:
    """The parts of an open workbook."""

    def __init__(self, location: Location, archive: zipfile.ZipFile, most: int) -> None:
        self._location, self._archive, self._most = location, archive, most
        main = next(iter(self._targets("", "/officeDocument").values()), "xl/workbook.xml")
        self._sheet_parts = self._targets(main, "/worksheet")
        self._strings, self._styles = (
            next(iter(self._targets(main, kind).values()), "") for kind in ("/sharedStrings", "/styles")
        )
        self.sheets: list[Sheet] = []
        self._first_day = _FIRST_DAYS[False]
        self._parse(main, self._about_sheet, small=True)

    def chosen(self, name: str) -> Sheet:
        """The sheet `name`, or the first that is not hidden. DataError for none."""
        known = [sheet for sheet in self.sheets if sheet.name == name] if name else sorted(self.sheets, key=_is_hidden)
        if not known:
            names, path = [sheet.name for sheet in self.sheets], self._location.name
            raise DataError(
                f"{path} has no sheet {name!r}; it has {', '.join(map(repr, names[:20])) or 'none with cells'}."
                f"{nearest(name, names)}"
            )
        return known[0]

    def _about_sheet(self, tag: str, given: Mapping[str, str]) -> None:
        if tag == "workbookPr":
            self._first_day = _FIRST_DAYS[given.get("date1904") in ("1", "true")]
        elif tag == "sheet" and (part := self._sheet_parts.get(given.get("id", ""))):
            self.sheets.append(Sheet(given.get("name", ""), part, given.get("state", "visible") != "visible"))

    def _targets(self, part: str, kind: str) -> dict[str, str]:
        """The parts that `part` names with a relation whose type ends in `kind`, by id."""
        folder, name = posixpath.split(part)
        found: dict[str, str] = {}

        def take(tag: str, given: Mapping[str, str]) -> None:
            if tag == "Relationship" and given.get("Type", "").endswith(kind) and given.get("TargetMode") != "External":
                found[given.get("Id", "")] = posixpath.normpath(posixpath.join("/", folder, given.get("Target", "")))[1:]

        relations = posixpath.join(folder, "_rels", f"{name}.rels")
        if relations in self._archive.NameToInfo:
            self._parse(relations, take, small=True)
        return found

    def date_styles(self) -> dict[int, bool]:
        """The numbers of the cell styles that show a date or a time, each with whether it is a duration."""
        formats: dict[int, str] = {}
        found: dict[int, bool] = {}
        inside, count = [""], [0]

        def take(tag: str, given: Mapping[str, str]) -> None:
            if tag == "numFmt":
                formats[int(given.get("numFmtId", 0))] = given.get("formatCode", "")[:255]
            elif tag in ("cellStyleXfs", "cellXfs"):
                inside[0] = tag
            elif tag == "xf" and inside[0] == "cellXfs":
                number = int(given.get("numFmtId", 0))
                code = _NOT_DATE.sub("", formats.get(number, ""))
                if (number in _DATES and number not in formats) or re.search("[dmyhs]", code, re.IGNORECASE):
                    found[count[0]] = number == 46 or bool(_ELAPSED.search(code))
                count[0] += 1

        if self._styles in self._archive.NameToInfo:
            self._parse(self._styles, take, small=True)
        return found

    def texts(self) -> list[str]:
        """The texts that cells share. Together they take at most as much memory as the file may unpack to."""
        found: list[str] = []
        pieces: list[str] = []
        state = {"size": 0, "phonetic": 0, "text": 0}

        def start(tag: str, _: Mapping[str, str]) -> None:
            state["phonetic"] += tag == "rPh"
            state["text"] = tag == "t" and not state["phonetic"]

        def end(tag: str) -> None:
            state["phonetic"] -= tag == "rPh"
            state["text"] = 0
            if tag == "si":
                found.append(_unescaped("".join(pieces)))
                pieces.clear()
                state["size"] += sys.getsizeof(found[-1]) + 8
                if state["size"] > self._most:
                    raise too_large(self._location.path, self._most)

        def said(text: str) -> None:
            if state["text"]:
                pieces.append(text)

        if self._strings in self._archive.NameToInfo:
            self._parse(self._strings, start, end, said)
        return found

    def merged(self, part: str) -> list[tuple[str, int, int]]:
        """The merged cells of a sheet, each with its first and last row; they stand behind all cells."""
        found, before = dict[tuple[str, int, int], None](), b""
        with self._archive.open(self._admitted(part)) as stream:
            while piece := stream.read(_PIECE):
                for left, top, right, bottom in _MERGED.findall(before + piece):
                    found[f"{(left + top).decode()}:{(right + bottom).decode()}", int(top[:9]), int(bottom[:9])] = None
                if len(found) > MOST_COLUMNS:
                    break
                before = piece[-200:]
        return list(found)

    def rows(self, part: str, dates: Mapping[int, bool], texts: Sequence[str], longest: int) -> Iterator[_SheetRow]:
        """The rows of a sheet that have a value, in order."""
        reader = _Cells(self._first_day, dates, texts, longest)
        for _ in self._pieces(part, reader.start, reader.end, reader.said):
            yield from reader.taken()

    def _admitted(self, part: str, most: int | None = None) -> zipfile.ZipInfo:
        """The part, unless it unpacks to more than `most` bytes, by default as many as the file may; zipfile reads no more than
        it says here."""
        about, most = self._archive.getinfo(part), self._most if most is None else most
        if about.file_size > most:
            raise too_large(self._location.path, most)
        return about

    def _parse(
        self, part: str, start: Elements, end: Callable[[str], None] | None = None, said: Callable[[str], None] | None = None,
        *, small: bool = False,
    ) -> None:  # fmt: skip
        for _ in self._pieces(part, start, end, said, small=small):
            pass

    def _pieces(
        self, part: str, start: Elements, end: Callable[[str], None] | None, said: Callable[[str], None] | None,
        *, small: bool = False,
    ) -> Iterator[None]:  # fmt: skip
        """Gives a part to the functions, by elements without their namespaces; yields after each piece of it."""
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = _refuse_entities
        parser.StartElementHandler = lambda tag, given: start(_local(tag), {_local(key): given[key] for key in given})
        if end is not None:
            parser.EndElementHandler = lambda tag: end(_local(tag))
        if said is not None:
            parser.CharacterDataHandler = said
        with self._archive.open(self._admitted(part, _SMALL if small else self._most)) as stream:
            while piece := stream.read(_PIECE):
                parser.Parse(piece, False)
                yield
            parser.Parse(b"", True)
            yield


class _Cells:
    """Takes the elements of a sheet, and makes rows of them."""

    def __init__(self, first_day: datetime.datetime, dates: Mapping[int, bool], texts: Sequence[str], longest: int) -> None:
        self._first_day, self._dates, self._texts, self._longest = first_day, dates, texts, longest
        self._row = _SheetRow(0)
        self._column = 0
        self._about: Mapping[str, str] = {}
        self._said: list[str] | None = None
        self._pieces: list[str] = []
        self._formula = False
        self._phonetic = 0
        self._ready: list[_SheetRow] = []

    def taken(self) -> list[_SheetRow]:
        """The rows that have ended, which are given once."""
        ready, self._ready = self._ready, []
        return ready

    def start(self, tag: str, given: Mapping[str, str]) -> None:
        if tag == "row":
            number = int(given.get("r", self._row.number + 1))
            if not self._row.number < number <= MOST_ROWS:
                raise ValueError(f"row {number:,} after row {self._row.number:,}, of at most {MOST_ROWS:,}")
            self._row, self._column = _SheetRow(number), 0
        elif tag == "c":
            place = _CELL.match(given.get("r", ""))
            column = _number(place[1]) if place else self._column + 1
            if not self._column < column <= MOST_COLUMNS:
                raise ValueError(f"column {column:,} after column {self._column:,}, of at most {MOST_COLUMNS:,}")
            self._column, self._about, self._formula = column, given, False
            self._pieces = []
        elif tag == "f":
            self._formula = True
        elif tag == "rPh":
            self._phonetic += 1
        elif tag in ("v", "t") and not self._phonetic:
            self._said = self._pieces

    def end(self, tag: str) -> None:
        if tag in ("v", "t"):
            self._said = None
        elif tag == "rPh":
            self._phonetic -= 1
        elif tag == "c":
            self._end_cell()
        elif tag == "row" and (self._row.cells or self._row.uncounted or self._row.size):
            self._ready.append(self._row)

    def said(self, text: str) -> None:
        if self._said is not None:
            self._row.size += len(text)
            if self._row.size <= self._longest:  # of a longer row no more is kept
                self._said.append(text)

    def _end_cell(self) -> None:
        text, self._pieces = "".join(self._pieces), []
        if not text:
            if self._formula and self._about.get("t") != "str":  # an empty text is the value of such a formula
                self._row.uncounted.append(self._column)
            return
        value = self._value(self._about.get("t", "n"), text)
        if value is not None and value != "":
            self._row.cells[self._column] = value

    def _value(self, kind: str, text: str) -> object:
        if kind == "s":
            shared = self._texts[int(text)]
            self._row.size += len(shared)
            return shared
        if kind == "b":
            return text.strip() == "1"
        if kind == "e":
            return None
        if kind != "n":
            return _unescaped(text)
        number = float(f"{float(text):.15g}")  # as many digits as a spreadsheet shows
        if not math.isfinite(number):
            return None
        style = int(self._about.get("s", 0))
        if style in self._dates:
            return _moment(number, self._first_day, self._dates[style])
        return int(number) if number.is_integer() else number


def _moment(days: float, first_day: datetime.datetime, elapsed: bool) -> object:
    """A date, a date with its time, a time alone or a duration; the number itself where no calendar has it."""
    seconds = round(days * 86400)
    if elapsed or 0 <= days < 1:
        return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}" if days >= 0 else days
    try:
        early = days < _FALSE_LEAP_DAY and first_day == _FIRST_DAYS[False]
        moment = first_day + datetime.timedelta(days=int(early), seconds=seconds)
    except OverflowError:
        return days
    return moment.date().isoformat() if seconds % 86400 == 0 else moment.isoformat(" ")


def _refuse_entities(*_: object) -> None:
    raise ValueError("it declares a document type, which no workbook does")


def _unescaped(text: str) -> str:
    """The text with the signs that XML cannot have, such as _x0007_; halves of characters stay escapes."""
    if "_x" not in text:
        return text
    return _ESCAPE.sub(lambda found: chr(code) if not 0xD800 <= (code := int(found[1], 16)) < 0xE000 else found[0], text)


def _local(tag: str) -> str:
    return tag.rpartition(":")[2]


def _is_hidden(sheet: Sheet) -> bool:
    return sheet.hidden


def _number(letters: str) -> int:
    """The number of a column: A is 1, AA is 27."""
    number = 0
    for letter in letters:
        number = 26 * number + ord(letter) - 64
    return number


def _letters(number: int) -> str:
    """The letters of a column: 1 is A, 27 is AA."""
    found = ""
    while number:
        number, place = divmod(number - 1, 26)
        found = chr(65 + place) + found
    return found
