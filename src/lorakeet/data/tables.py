"""Reads records with their places from text files: JSON lines, JSON arrays, CSV, TSV and plain lines."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import IO, NamedTuple

from lorakeet.data.guarded_stream import MOST_UNPACKED
from lorakeet.data.locate import Location, open_text
from lorakeet.data.spec import LONGEST_ROW
from lorakeet.errors import DataError, Problems, Remedy, spelt

SHOWN_PROBLEMS = 10
DELIMITER_NAMES = {"\t": "tab"}  # as a flag names those that a shell cannot
LEAVE_OUT = Remedy("data.bad_rows", "drop", "Leave out rows that cannot be used")
_BLANKS = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = 12  # characters of "-Infinity" or an escape, and some
_START = 60  # characters of a broken line that are shown
_FIX = "fix or remove the line."


class FileRecord(NamedTuple):
    """One record of a file: `source` is "file.tsv:17", `values` its columns or keys."""

    source: str
    values: dict[str, object]


class InMemory(NamedTuple):
    """Rows that were given in memory and are kept as JSON lines: their words in messages, and those of each row."""

    words: str
    sources: Sequence[str]


IN_MEMORY: ContextVar[Mapping[str, InMemory]] = ContextVar("IN_MEMORY", default={})  # noqa: B039 (never changed); by name


def given_name(name: str) -> str:
    """How messages name the rows `name`: as they are, or as they were given in memory."""
    known = IN_MEMORY.get().get(name)
    return name if known is None else known.words


class UnusableRow(Exception):
    """Says why one record cannot become a row; it is added to RowProblems."""


class RowProblems:
    """Collects problems of single rows; names the first `shown` and counts the rest."""

    def __init__(self, heading: str, shown: int = SHOWN_PROBLEMS) -> None:
        self._shown = shown
        remedy = f"To leave such rows out, set {LEAVE_OUT.flag}." if LEAVE_OUT.flag else ""
        self._problems = Problems(heading, DataError, remedy=remedy, remedies=[LEAVE_OUT], code="rows-unusable")

    def add(self, source: str, message: str) -> None:
        if len(self._problems.errors) < self._shown:
            self._problems.add(f"{source}: {message}")
        else:
            self._problems.others += 1

    @property
    def count(self) -> int:
        """How many rows have a problem."""
        return len(self._problems.errors) + self._problems.others

    @property
    def first(self) -> str:
        """The first problem."""
        return str(self._problems.errors[0])

    def raise_if_any(self) -> None:
        """Raises a DataError with the first problems and the number of the others."""
        self._problems.raise_if_any()


@dataclass(frozen=True)
class TextFormat:
    """How a text file is read. `delimiter` separates the columns of .csv and .tsv files; by default a comma and a tab."""

    encoding: str = "utf-8"
    delimiter: str | None = None
    longest: int = 8 * LONGEST_ROW  # characters of a line: a row with its escapes and other columns
    unpacked: int = MOST_UNPACKED  # bytes


def text_records(location: Location, problems: RowProblems, text: TextFormat | None = None) -> Iterator[FileRecord]:
    """Yields the records of a text file; rows that cannot be read are added to `problems` and skipped."""
    text = text or TextFormat()
    if (known := IN_MEMORY.get().get(str(location.path))) is not None:
        with open_text(location, text.encoding, text.unpacked) as stream:
            yield from map(FileRecord, known.sources, map(json.loads, stream))
        return
    separated = text.delimiter and location.kind in (".csv", ".tsv")
    reader = _separated(text.delimiter or "", given=True) if separated else READERS[location.kind]
    with open_text(location, text.encoding, text.unpacked) as stream:
        yield from reader(LineReader(stream, text.longest), location.name.rsplit("/", 1)[-1], problems)


class LineReader:
    """The lines of a text stream; of a line of more than `longest` characters only a beginning is kept."""

    def __init__(self, stream: IO[str], longest: int) -> None:
        self.stream, self.longest = stream, longest

    def __iter__(self) -> Iterator[str]:
        line = self._piece()
        while line:
            last = line
            while self._full(last) and not last.endswith(("\n", "\r")):  # the rest of it, in pieces
                last = self._piece()
            following = self._piece() if self._full(last) and last.endswith("\r") else "\n"
            yield line
            line = self._piece() if following == "\n" else following  # "\n" alone ends a line that "\r" began to end

    def _piece(self) -> str:
        return self.stream.readline(self.longest + 2)  # with a line end of two characters

    def _full(self, piece: str) -> bool:
        return len(piece) == self.longest + 2

    def too_long(self, line: str) -> bool:
        """True if the line, without its end, is longer."""
        return len(line.rstrip("\r\n")) > self.longest

    @property
    def refusal(self) -> str:
        """The problem of such a line."""
        return (
            f"the line has more than {self.longest:,} characters; shorten or remove it, or raise "
            f"{spelt('data.longest_row')} (a line may "
            "have 8 times as many)."
        )


def _json_lines(stream: LineReader, name: str, problems: RowProblems) -> Iterator[FileRecord]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        source = f"{name}:{number}"
        if stream.too_long(line):
            problems.add(source, stream.refusal)
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(source, f"broken JSON{_where(error)}: {_start_of(line)}; {_FIX}")
            continue
        if isinstance(values, dict):
            yield FileRecord(source, values)
        else:
            problems.add(source, f"expected an object in braces, got {_start_of(line)}; {_FIX}")


def _json_array(stream: LineReader, name: str, problems: RowProblems) -> Iterator[FileRecord]:
    """Objects of an array, each with at most `longest` characters; DataError where the text is no array, and for a longer one."""
    text = JsonText(stream, name)
    if text.next_sign() != "[":
        value = text.value()
        if text.next_sign():
            raise text.broken("Extra data")
        start = _start_of(json.dumps(value))
        raise DataError(f"{name}: expected an array of objects, got {start}; write one object a line in a .jsonl file.")
    text.pass_sign()
    number, sign = 0, text.next_sign()
    while sign != "]":
        number += 1
        values = text.value()
        if isinstance(values, dict):
            yield FileRecord(f"{name}[{number}]", values)
        else:
            problems.add(f"{name}[{number}]", f"expected an object in braces, got {_start_of(json.dumps(values))}.")
        sign = text.next_sign()
        if sign not in ("]", ","):
            raise text.broken("Expecting ',' delimiter")
        if sign == ",":
            text.pass_sign()
            text.next_sign()
    text.pass_sign()
    if text.next_sign():
        raise text.broken("Extra data")


class JsonText:
    """A JSON text as it is read, value by value; no more of it is kept than the longest value may have."""

    piece = 1 << 18  # characters

    def __init__(self, stream: LineReader, name: str) -> None:
        self._stream, self._name, self._longest = stream.stream, name, stream.longest
        self._refusal = stream.refusal
        self.kept, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 0  # of the first character that is kept
        self._decoder = json.JSONDecoder()

    def next_sign(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            blanks = _BLANKS.match(self.kept, self._at)
            self._at = blanks.end() if blanks else self._at
            if self._at < len(self.kept) or not self.read_on():
                return self.kept[self._at : self._at + 1]

    def pass_sign(self) -> None:
        """Goes on behind the next character."""
        self._at += 1

    def value(self) -> object:
        """The value that begins here; DataError for a broken one, and for one that is too long."""
        while True:
            broken: Exception | None = None
            try:
                value, end = self._decoder.raw_decode(self.kept, self._at)
            except (ValueError, RecursionError) as error:
                if self._is_final(error):
                    raise self._broken_value(error) from error
                broken, end = error, len(self.kept)
            known = end < len(self.kept) or self._ended  # a number that ends where the text does may go on
            if end - self._at > self._longest:
                raise DataError(f"{self._name}:{self._place(self._at)[0]}: {self._refusal.replace('the line', 'the value', 1)}")
            if broken is None and known:
                self._at = end
                return value
            if not self.read_on(len(self.kept) - self._at):  # twice as much, so that reading stays linear
                if broken is None:
                    continue
                raise self._broken_value(broken)

    def _is_final(self, error: Exception) -> bool:
        """Whether no further text would mend the value: it is broken before the end of what is kept."""
        if not isinstance(error, json.JSONDecodeError):
            return True  # nested too deep, or a number of too many digits
        return error.pos < len(self.kept) - _LONGEST_WORD and not error.msg.startswith("Unterminated string")

    def broken(self, why: str) -> DataError:
        """The error for an unexpected character here."""
        return self._broken_value(json.JSONDecodeError(why, self.kept, self._at))

    def _broken_value(self, error: Exception) -> DataError:
        place = error.pos if isinstance(error, json.JSONDecodeError) else self._at
        number, column = self._place(place)
        begin = self.kept.rfind("\n", 0, place) + 1
        line = self.kept[begin:].split("\n", 1)[0]  # json counts "\n" only
        where = f" at column {column} ({error.msg})" if isinstance(error, json.JSONDecodeError) else _where(error)
        hint = "; if each line is an object of its own, name the file .jsonl" if "Extra data" in str(error) else ""
        return DataError(f"{self._name}:{number}: broken JSON{where}: {_start_of(line)}{hint}.")

    def _place(self, at: int) -> tuple[int, int]:
        """The line and the column of a character that is kept, both from 1 on."""
        number = self._line + self.kept.count("\n", 0, at)
        begin = self.kept.rfind("\n", 0, at)
        return number, at - begin if begin >= 0 else self._column + at + 1

    def read_on(self, least: int = 0) -> bool:
        """Reads on, `least` characters or more, and drops what was passed; False at the end."""
        piece = "" if self._ended else self._stream.read(max(self.piece, least))
        if not piece:
            self._ended = True
            return False
        self._line, self._column = self._place(self._at)[0], self._place(self._at)[1] - 1
        self.kept, self._at = self.kept[self._at :] + piece, 0
        return True


def _where(error: Exception) -> str:
    """The column and cause of a JSON error, or the limit of Python that was exceeded (digits, nesting)."""
    if isinstance(error, json.JSONDecodeError):
        return f" at column {error.colno} ({error.msg})"
    return " (brackets nested too deep)" if isinstance(error, RecursionError) else f" ({error})"


def _separated(delimiter: str, *, given: bool = False) -> Callable[[LineReader, str, RowProblems], Iterator[FileRecord]]:
    def read(stream: LineReader, name: str, problems: RowProblems) -> Iterator[FileRecord]:
        lines = iter(stream)
        first = next(lines, "")
        _refuse_excel_s_line(first, delimiter, name)
        other = _other_separator(first, delimiter)
        hint = separator_remedies(first, delimiter)
        with _long_fields(stream.longest):
            reader = csv.reader(_whole_lines(chain([first], lines), stream), delimiter=delimiter, strict=True)
            header = next(_checked(reader, name, hint, 1), None)
        if header is None:
            return
        one = len(header) == 1
        if one and hint and not given:
            said = f"{name} has one column, {header[0]!r:.80}, which seems to be several."
            raise DataError(f"{said}{separator_hint(hint)}", remedies=hint)
        refuse_equal_columns(header, name)
        rows, none_yet, number = _checked(reader, name, hint if one else [], 2), True, 1
        while True:
            # Set around each row: the limit is global to the process, and a reader may be abandoned halfway.
            with _long_fields(stream.longest):
                row = next(rows, None)
            if row is None:
                return
            number += 1
            source = row_place(name, number)
            if not row:
                continue
            if len(row) != len(header):
                counted = f"{len(row)} fields where the header has {len(header)} ({', '.join(header)})"
                if none_yet and hint and first.count(other) == delimiter.join(row).count(other):
                    raise DataError(f"{source}: {counted}.{separator_hint(hint)}", remedies=hint)
                problems.add(source, f"{counted}; {_FIX}")
                continue
            none_yet = False
            yield FileRecord(source, dict(zip(header, row, strict=True)))

    return read


def row_place(name: str, number: int) -> str:
    """The place of a row of the table `name` as a spreadsheet numbers it: the header is row 1, a row of several lines is one."""
    return f"{name}:{number}"


def refuse_equal_columns(header: Sequence[str], name: str) -> None:
    """Raises DataError for columns of one name."""
    if twice := sorted(column for column, count in Counter(header).items() if count > 1):
        raise DataError(f"{name} has more than one column {', '.join(map(repr, twice))}; give each column its own name.")


def separator_remedies(text: str, delimiter: str = "") -> list[Remedy]:
    """What to set where `text` has a sign that separates columns, other than `delimiter`; else empty."""
    sign = _other_separator(text, delimiter)
    name = DELIMITER_NAMES.get(sign, sign)
    return [Remedy("data.delimiter", name, f"Columns are separated by {name!r}")] if sign else []


def separator_hint(remedies: Sequence[Remedy]) -> str:
    """The sentence of a message that names `separator_remedies`, with a space before it; empty for none."""
    return "".join(f" Its columns may be separated by {one.value!r}: set {one.flag}." for one in remedies)


def _other_separator(text: str, delimiter: str) -> str:
    return next((sign for sign in ";\t|," if sign != delimiter and sign in text), "")


def _refuse_excel_s_line(first: str, delimiter: str, name: str) -> None:
    start, _, sign = first.strip('"\r\n').partition("=")
    if start.lower() == "sep" and len(sign) <= 1:
        other = "".join(f", and set {one.flag}" for one in separator_remedies(sign, delimiter))
        raise DataError(f"{name} begins with {first.strip()!r}, a line for Excel alone. Remove that line{other}.")


class _LongLine(csv.Error):
    """A line that is too long, after which the end of a quoted field is not known."""


def _checked(reader: Iterator[list[str]], name: str, hint: Sequence[Remedy], number: int) -> Iterator[list[str]]:
    """The rows from `number` on; DataError for what is no row, with the `hint` that another separator may be the cause."""
    try:
        for row in reader:
            yield row
            number += 1
    except csv.Error as error:
        place = row_place(name, number)
        if isinstance(error, _LongLine):
            raise DataError(f"{place}: {error}") from error
        if "field limit" in str(error):
            raise DataError(f"{place}: {error}; close double quotes, or raise {spelt('data.longest_row')}.") from error
        expected = "expected closed double quotes, and doubled quotes inside a field."
        raise DataError(f"{place}: {error}; {expected}{separator_hint(hint)}", remedies=hint) from error


def _whole_lines(lines: Iterable[str], stream: LineReader) -> Iterator[str]:
    for line in lines:
        if stream.too_long(line):
            raise _LongLine(stream.refusal)
        yield line


@contextmanager
def _long_fields(longest: int) -> Iterator[None]:
    before = csv.field_size_limit(longest)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _lines(stream: LineReader, name: str, problems: RowProblems) -> Iterator[FileRecord]:
    for number, line in enumerate(stream, start=1):
        if stream.too_long(line):
            problems.add(f"{name}:{number}", stream.refusal)
        elif line.strip():
            yield FileRecord(f"{name}:{number}", {"text": line.rstrip("\r\n")})


def _start_of(line: str) -> str:
    start = line.strip()
    return repr(start if len(start) <= _START else start[:_START] + "…")


READERS: dict[str, Callable[[LineReader, str, RowProblems], Iterator[FileRecord]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".txt": _lines,
}
