"""Writes records as they were read, with more columns: tables keep delimiter, encoding and line ends, JSON lines their fields."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

Write = Callable[[Mapping[str, object]], None]


@dataclass(frozen=True)
class TableForm:
    """How a table is written: its separator, its encoding and the end of its lines; `said` is a sentence on what is not kept."""

    delimiter: str = ","
    encoding: str = "utf-8"
    line_end: str = "\n"
    said: str = ""


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
    if _writes(encoding, texts):
        return TableForm(delimiter, encoding, line_end)
    said = f"{out.name} is written in UTF-8 with a mark: an answer may have characters that {encoding} cannot write."
    return TableForm(delimiter, _MARKED, line_end, said)


def _writes(encoding: str, texts: Sequence[str] | None) -> bool:
    if encoding.lower().startswith(("utf", "gb18030")):
        return True
    try:
        "".join(texts or ["\u4e00"]).encode(encoding)
    except UnicodeEncodeError:
        return False
    return texts is not None


@contextmanager
def record_writer(path: Path, form: TableForm) -> Iterator[Write]:
    """A function that writes one record after another to the new file `path`; of a table the first has all columns."""
    with create(path) as binary, io.TextIOWrapper(binary, encoding=form.encoding, newline="") as stream:
        yield _json_lines(stream) if path.suffix.lower() not in TABLES else _table(stream, form)
        stream.flush()


def _json_lines(stream: io.TextIOWrapper) -> Write:
    def write(values: Mapping[str, object]) -> None:
        stream.write(json.dumps(values, ensure_ascii=False, default=str) + "\n")

    return write


def _table(stream: io.TextIOWrapper, form: TableForm) -> Write:
    table = csv.writer(stream, delimiter=form.delimiter, lineterminator=form.line_end)
    columns: list[str] = []

    def write(values: Mapping[str, object]) -> None:
        if not columns:
            columns.extend(values)
            table.writerow(columns)
        table.writerow([_cell(values.get(column)) for column in columns])

    return write


def _cell(value: object) -> str:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else str(value)
