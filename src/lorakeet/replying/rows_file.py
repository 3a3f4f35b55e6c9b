"""The file of rows that is answered, read once before the model is loaded: its form, its columns, and what is added to them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lorakeet.data.predicted.contents import Contents
from lorakeet.data.predicted.unlabelled import fitting_columns, row_shaper
from lorakeet.data.predicted.written_records import TableForm, can_write, cell_text, form_like
from lorakeet.data.read import read_records
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import FileRecord, RowProblems, given_name
from lorakeet.errors import ConfigError, DataError, spelt
from lorakeet.evaluate.reading.numbers import decimal_mark

_DECIMALS = re.compile(r"(?![-+]?\d{1,3}[.,]\d{3}$)[-+]?\d+(?:(?:\.\d{3})*,|(?:,\d{3})*\.)\d+")  # 1,5 and 1.234,5; not 1.234
_SAMPLED = 100  # records from which columns are proposed
ANSWER = "answer"


@dataclass(frozen=True)
class RowsFile:
    """A file that was read once: how it is read and written, its columns and those that are added, its rows and characters.

    `constant` is what each row has in an added column: that the adapter is uncertified.
    """

    spec: DataSpec
    form: TableForm
    own: tuple[str, ...]
    columns: tuple[str, ...]
    rows: int
    characters: int
    notes: tuple[str, ...]
    constant: Mapping[str, str]


def read_rows_file(spec: DataSpec, out: Path, column: str | None, labels: Sequence[str], note: str = "") -> RowsFile:
    """Reads the file `spec.train`, whose rows get answers in `column` (None: the label column, or ANSWER) of the new file `out`.

    So what is wrong with it is known before the model is loaded. `note` is added to each row, unless it is empty.
    """
    name, shown = spec.train, given_name(spec.train)
    lines, empty = RowProblems(f"{shown} cannot be used as it is"), RowProblems(name)
    notes, rows, characters = list[str](), 0, 0
    form = form_like(name, spec, out, labels or None)
    if first := list(islice(read_records(name, lines, spec), _SAMPLED)):
        form = dataclasses.replace(form, decimal=table_decimal(first, form))
        spec, taken = fitting_columns(first, shown, spec, labels)
        notes += [taken] if taken else []
    lines = RowProblems(f"{shown} cannot be used as it is")
    contents, shaped = Contents(form, out, lines), row_shaper(shown, spec, labels, empty)
    for record in read_records(name, lines, spec):
        rows, row = rows + 1, shaped(record)
        contents.add(record)
        characters += 0 if row is None else len(row.text)
    lines.raise_if_any()
    if not rows:
        raise DataError(f"{shown} has no rows; expected at least one record below the header.")
    if empty.count == rows:
        raise DataError(f"No row of {shown} can be answered; first {empty.first}")
    if empty.count:
        notes.append(f"{empty.count:,} of {rows:,} rows get no answer; first {empty.first}")
    columns = _new_columns(spec, column, contents.columns, labels, noted=bool(note))
    constant = {columns[-1]: note} if note else {}
    if not (contents.fits and can_write(form.encoding, "".join((*columns, note)))):
        form = form.in_utf_8(out, "a column or a cell has")
    notes += [form.said] if form.said else []
    return RowsFile(spec, form, tuple(contents.columns), columns, rows, characters, tuple(notes), constant)


def table_decimal(records: Sequence[FileRecord], form: TableForm) -> str:
    """The decimal mark of a table's numbers; where it has none, that of spreadsheets that separate columns in its way."""
    every = (cell_text(value).strip() for record in records for value in record.values.values())
    cells = [cell for cell in every if _DECIMALS.fullmatch(cell)]
    return decimal_mark(cells) if cells else "," if form.delimiter == ";" else "."


def _new_columns(
    spec: DataSpec, column: str | None, known: Collection[str], labels: Sequence[str], *, noted: bool
) -> tuple[str, ...]:
    """The names of the added columns; ConfigError if a record of the file has one of them."""
    own = (spec.label_column or "label") if labels else ANSWER
    name = column or (f"{own}_predicted" if own in known else own)
    endings = ("probability", "margin") * bool(labels) + ("review",) + ("adapter",) * noted
    columns = (name, *(f"{name}_{ending}" for ending in endings))
    if not can_write("utf-8", name):
        raise ConfigError(f"{spelt('column')} {name!r} has half of a character. Choose another name.")
    if taken := [column for column in columns if column in known]:
        said = f"{given_name(spec.train)} has a column {taken[0]!r} already."
        raise ConfigError(f"{said} Choose another name with {spelt('column')}.")
    return columns
