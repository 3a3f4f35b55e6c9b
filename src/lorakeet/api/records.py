"""Records in memory as JSON lines: dicts, a pandas.DataFrame, a pyarrow.Table or a datasets.Dataset. Imports none of these."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lorakeet.data.read import dataset_records
from lorakeet.errors import DataError

_SHOWN = 60  # characters of a value in a message
_LARGEST = 10**300  # of whole numbers: Python writes none of more than 4,300 digits
_EXACT = 2**53  # fractions of 64 bits hold every whole number below
_NAMED = 3  # levels whose names a message says
_DEEPEST = 200  # levels of dicts and lists


def jsonl_of(records: Any) -> bytes:
    """The records as JSON lines, one each, in UTF-8.

    Missing values of a table are null, dates are ISO texts. A text alone is a row of plain text. Raises DataError that names
    the row, for what is no mapping of columns and for values that JSON has not.
    """
    lines = []
    for number, record in enumerate(_records(records), start=1):
        columns = {"text": record} if isinstance(record, str) else record
        if not isinstance(columns, Mapping):
            said = f"{record!r:.{_SHOWN}} ({type(record).__name__})"
            raise DataError(f"Row {number} is {said}; expected a dict of columns, such as {{'prompt': …}}.")
        lines.append(json.dumps(_plain(columns, f"row {number}"), ensure_ascii=False) + "\n")
    if not lines:
        raise DataError("There are no rows; expected at least one record.")
    return "".join(lines).encode("utf-8", "surrogatepass")


def _records(given: Any) -> Iterator[Any]:
    """The records of a container; a table's rows are dicts."""
    if hasattr(given, "to_pylist") and hasattr(given, "column_names"):  # a pyarrow.Table
        yield from given.to_pylist()
    elif is_frame(given):
        yield from _whole_numbers(given).to_dict(orient="records")
    elif hasattr(given, "features") and hasattr(given, "column_names"):  # a datasets.Dataset
        yield from (record.values for record in dataset_records(given, "rows"))
    elif isinstance(given, Mapping):
        names = ", ".join(map(repr, list(given)[:8]))
        raise DataError(f"The rows are one mapping with {names}; expected a list of dicts, or a part of it: rows['train'].")
    elif isinstance(given, Iterable):
        yield from given


def is_frame(given: Any) -> bool:
    """Whether it is a pandas.DataFrame."""
    return hasattr(given, "to_dict") and hasattr(given, "columns") and hasattr(given, "index")


def row_names(given: Any, part: str, count: int) -> tuple[str, ...]:
    """How messages name each row of the part: by its index in a frame, with its place where the index repeats; else by place."""
    if not is_frame(given):
        return tuple(f"{part} row {number}" for number in range(1, count + 1))
    repeats = not given.index.is_unique
    return tuple(
        f"{part} index {label!r}{f' (row {number})' if repeats else ''}"
        for number, label in enumerate(given.index.tolist(), start=1)
    )


def _whole_numbers(frame: Any) -> Any:
    """The frame, whose columns of whole numbers that pandas made fractions, since a value is missing, have whole numbers."""
    changed = frame.copy(deep=False)
    for place, column in enumerate(frame.columns):
        values = frame.iloc[:, place]
        if getattr(values.dtype, "kind", "") == "f" and values.isna().any():
            known = values.dropna()
            if len(known) and (known % 1 == 0).all() and known.abs().max() < _EXACT:
                changed[column] = values.astype("Int64")
    return changed


def _plain(value: Any, where: str, level: int = 0) -> Any:
    """The value as JSON has it. `level`: how deep it lies in the record."""
    if level > _DEEPEST:
        raise DataError(f"{where[0].upper()}{where[1:]} is nested deeper than {_DEEPEST} levels, or contains itself. Flatten it.")
    if isinstance(value, Mapping):
        named = level < _NAMED
        return {
            str(name): _plain(item, f"{where}, column {name!r:.{_SHOWN}}" if named else where, level + 1)
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, level + 1) for item in value]
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):  # a number or an array of numpy
        return _plain(value.tolist(), where, level + 1)
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int) and abs(value) < _LARGEST:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' missing values
        return None
    if hasattr(value, "isoformat"):
        return value.isoformat()
    shown = f"more than {_LARGEST:.0e}" if isinstance(value, int) else f"{value!r:.{_SHOWN}}"
    said = f"{shown} ({type(value).__name__})"
    raise DataError(f"{where[0].upper()}{where[1:]} is {said}, which JSON has not; expected a text or a number.")
