"""Reads rows from a named data file: finds the file, picks its reader and gives every record its shape."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lorakeet.data.columns import folder_records, hub_records, is_hub_id, parquet_records
from lorakeet.data.locate import PACKAGE, locate_data
from lorakeet.data.rows import Row
from lorakeet.data.shapes import shape_rows
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import READERS, FileRecord, RowProblems, text_records
from lorakeet.errors import DataError, nearest


def read_rows(name: str, spec: DataSpec) -> list[Row]:
    """Reads the rows of one file, folder or hub data set, at most `spec.limit` of them.

    Raises one DataError that lists all problems of single rows.
    """
    problems = RowProblems(f"{name} cannot be used as it is")
    rows = list(shape_rows(islice(read_records(name, problems), spec.limit), name, spec, problems))
    problems.raise_if_any()
    if not rows:
        raise DataError(f"{name} has no rows; expected at least one record below the header.")
    return rows


def read_records(name: str, problems: RowProblems) -> Iterator[FileRecord]:
    """Yields the records of one file, folder or hub data set, in order and unchanged."""
    base, mark, split = name.partition("#")
    if mark and Path(base).expanduser().is_dir():
        return folder_records(Path(base).expanduser(), split)
    if not name.startswith(PACKAGE) and not Path(name).expanduser().exists() and is_hub_id(name):
        return hub_records(name)
    location = locate_data(name)
    if location.path.is_dir():
        return folder_records(location.path, "")
    if location.kind == ".parquet":
        return parquet_records(location)
    if location.kind in READERS:
        return text_records(location, problems)
    known = [*READERS, ".parquet"]
    raise DataError(
        f"{name} ends in '{location.kind}', which has no reader; expected one of {', '.join(known)} "
        f"(text files also with .gz).{nearest(location.kind, known)}"
    )
