"""Writes records as they were read, with more columns: tables keep delimiter, encoding and line ends, JSON lines their fields."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lorakeet.data.locate import locate_data, open_binary
from lorakeet.data.read import is_hub_id
from lorakeet.data.spec import DataSpec
from lorakeet.disk import create
from lorakeet.errors import ConfigError

TABLES = {".csv": ",", ".tsv": "\t"}
WRITTEN = (*TABLES, ".jsonl")
_UTF_8_MARK = b"\xef\xbb\xbf"
_FIRST = 1 << 16  # bytes in which the first line ends
_MARKED = "utf-8-sig"

Write = Callable[[Mapping[str, object]], bool]


@dataclass(frozen=True)
class TableForm:
    """How a table is written: its separator, its encoding and the end of its lines; `said` is a sentence on what is not kept."""

    delimiter: str = ","
    encoding: str = "utf-8"
    line_end: str = "\n"
    said: str = ""

    def in_utf_8(self, out: Path, what: str) -> TableForm:
        """The same in UTF-8 with a mark, which spreadsheets read; `what` has what the encoding cannot write."""
        said = f"{out.name} is written in UTF-8 with a mark: {what} characters that {self.encoding} cannot write."
        return replace(self, encoding=_MARKED, said=said)


def require_written_format(out: Path) -> None:
    """Raises ConfigError unless the ending of `out` names a format that is written."""
    if out.suffix.lower() not in WRITTEN:
        raise ConfigError(f"--out {out} ends in '{out.suffix}'; expected one of {', '.join(WRITTEN)}. Give it such a name.")


def form_like(name: str, spec: DataSpec, out: Path, texts: Sequence[str] | None) -> TableForm:
    """The form of the rows `name`, as far as `out` is the same kind of table.

    `texts` are all that may be added, None if that is not known. What the encoding may not be able to write is written in UTF-8
    with a mark, which spreadsheets read.
    """
    kind = out.suffix.lower()
    default = TableForm(TABLES.get(kind, ","))
    if is_hub_id(name) or kind not in TABLES:
        return default
    location = locate_data(name)
    if location.path.is_dir() or location.kind not in (*TABLES, ".txt"):
        return default
    with open_binary(location) as stream:
        beginning = stream.peek(_FIRST)[:_FIRST]
    plain = spec.encoding.lower().replace("_", "-") in ("utf-8", "utf8")
    encoding = _MARKED if plain and beginning.startswith(_UTF_8_MARK) else spec.encoding
    line_end = "\r\n" if b"\r\n" in beginning or b"\r\x00\n" in beginning else "\n"
    delimiter = (spec.separator_of_columns or TABLES[kind]) if location.kind == kind else TABLES[kind]
    form = TableForm(delimiter, encoding, line_end)
    every_letter = codecs.lookup(encoding).name.startswith(("utf", "gb18030"))
    if every_letter or (texts is not None and can_write(encoding, "".join(texts))):
        return form
    return form.in_utf_8(out, "an answer may have")


def can_write(encoding: str, text: str) -> bool:
    """Whether the encoding has all characters of the text; none has half of one, as JSON can escape it."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def record_writer(path: Path, form: TableForm, columns: Sequence[str]) -> Iterator[Write]:
    """A function that writes one record after another to the new file `path`; a table has these columns, and no others.

    It returns False for a record with a character that the encoding cannot write, in whose place "?" stands.
    """
    with create(path) as binary, io.TextIOWrapper(binary, encoding=form.encoding, errors="replace", newline="") as stream:
        yield _json_lines(stream) if path.suffix.lower() not in TABLES else _table(stream, form, columns)
        stream.flush()


def _json_lines(stream: io.TextIOWrapper) -> Write:
    def write(values: Mapping[str, object]) -> bool:
        text = json.dumps(values, ensure_ascii=False, default=str)
        # Half of a character stays the escape that it was.
        stream.write((text if can_write(stream.encoding, text) else json.dumps(values, default=str)) + "\n")
        return True

    return write


def _table(stream: io.TextIOWrapper, form: TableForm, columns: Sequence[str]) -> Write:
    def line(cells: Sequence[str]) -> bool:
        text = form.delimiter.join(_quoted(cell, form.delimiter) for cell in cells)
        stream.write((text or '""') + form.line_end)
        return can_write(form.encoding, text)

    line(columns)
    return lambda values: line([cell_text(values.get(column)) for column in columns])


def _quoted(cell: str, delimiter: str) -> str:
    """The cell, in quotes where it has a sign that readers obey; csv.writer leaves a lone "\\r" bare before Python 3.13."""
    return '"' + cell.replace('"', '""') + '"' if any(sign in cell for sign in (delimiter, '"', "\r", "\n")) else cell


def cell_text(value: object) -> str:
    """A value as a cell of a table: nothing for None, JSON for lists and objects."""
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else str(value)
