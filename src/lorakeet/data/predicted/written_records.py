"""Writes records as they were read, with more columns.

Tables keep delimiter, decimal mark, encoding and line ends, JSON lines their fields. A workbook is written as one sheet.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO
from xml.sax.saxutils import escape

from lorakeet.data.locate import locate_data, open_binary
from lorakeet.data.read import is_hub_id
from lorakeet.data.spec import DataSpec
from lorakeet.disk import create
from lorakeet.errors import ConfigError, spelt

TABLES = {".csv": ",", ".tsv": "\t"}
WORKBOOK = ".xlsx"
WRITTEN = (*TABLES, WORKBOOK, ".jsonl")
_MOST_ROWS, _LONGEST_CELL = 1 << 20, 32_767  # of a sheet in Excel, and characters
_NO_XML = re.compile(r"[\x00-\x08\x0b-\x1f\ufffe\uffff]|_(?=x[0-9A-Fa-f]{4}_)")  # what a workbook writes as _x0007_
_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_TYPE = "application/vnd.openxmlformats-"
_CELLS = "xl/worksheets/sheet1.xml"
_PARTS = {  # of a workbook beside its one sheet (ECMA-376, part 1)
    "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
    f'<Default Extension="rels" ContentType="{_TYPE}package.relationships+xml"/>'
    f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPE}officedocument.spreadsheetml.sheet.main+xml"/>'
    f'<Override PartName="/{_CELLS}" ContentType="{_TYPE}officedocument.spreadsheetml.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship Id="r" Type="{_OFFICE}/officeDocument" '
    'Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{_OFFICE}"><sheets>'
    '<sheet name="Answers" sheetId="1" r:id="r"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship Id="r" '
    f'Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}
_UTF_8_MARK = b"\xef\xbb\xbf"
_FIRST = 1 << 16  # bytes in which the first line ends
_MARKED = "utf-8-sig"

Write = Callable[[Mapping[str, object]], bool]


@dataclass(frozen=True)
class TableForm:
    """How a table is written: its separator, its encoding, the end of its lines and the decimal mark of its numbers.

    `said` is a sentence on what is not kept.
    """

    delimiter: str = ","
    encoding: str = "utf-8"
    line_end: str = "\n"
    decimal: str = "."
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
    kind = path.suffix.lower()
    with ExitStack() as opened:
        binary: IO[bytes] = opened.enter_context(create(path))
        if kind == WORKBOOK:
            archive = opened.enter_context(zipfile.ZipFile(binary, "w", zipfile.ZIP_DEFLATED))
            for name, text in _PARTS.items():
                archive.writestr(name, text)
            binary = opened.enter_context(archive.open(_CELLS, "w", force_zip64=True))
        stream = opened.enter_context(io.TextIOWrapper(binary, encoding=form.encoding, errors="replace", newline=""))
        if kind == WORKBOOK:
            stream.write(f'<worksheet xmlns="{_MAIN}"><sheetData>')
            yield _sheet(stream, columns)
            stream.write("</sheetData></worksheet>")
        else:
            yield _table(stream, form, columns) if kind in TABLES else _json_lines(stream)
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
    return lambda values: line([cell_text(values.get(column), form.decimal) for column in columns])


def _sheet(stream: io.TextIOWrapper, columns: Sequence[str]) -> Write:
    rows = itertools.count(1)

    def line(values: Sequence[object]) -> bool:
        if next(rows) > _MOST_ROWS:
            raise ConfigError(f"A workbook has at most {_MOST_ROWS:,} rows. Name a .csv file as {spelt('out')}.")
        stream.write(f"<row>{''.join(map(_cell, values))}</row>")
        return True

    line(columns)
    return lambda values: line([values.get(column) for column in columns])


def _cell(value: object) -> str:
    """A cell of a workbook; numbers stay numbers, which each office shows in its own way."""
    if isinstance(value, bool):
        return f'<c t="b"><v>{value:d}</v></c>'
    if isinstance(value, (int, float)) and math.isfinite(value):
        return f"<c><v>{value!r}</v></c>"
    text = cell_text(value)
    if len(text) > _LONGEST_CELL:
        said = f"A cell has {len(text):,} characters; in a workbook it has at most {_LONGEST_CELL:,}."
        raise ConfigError(f"{said} Name a .csv file as {spelt('out')}.")
    text = escape(_NO_XML.sub(lambda found: f"_x{ord(found[0]):04X}_", text))
    return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>' if text else "<c/>"


def _quoted(cell: str, delimiter: str) -> str:
    """The cell, in quotes where it has a sign that readers obey; csv.writer leaves a lone "\\r" bare before Python 3.13."""
    return '"' + cell.replace('"', '""') + '"' if any(sign in cell for sign in (delimiter, '"', "\r", "\n")) else cell


def cell_text(value: object, decimal: str = ".") -> str:
    """A value as a cell of a table: nothing for None, JSON for lists and objects."""
    if value is None:
        return ""
    if isinstance(value, float):
        return str(value).replace(".", decimal)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else str(value)
