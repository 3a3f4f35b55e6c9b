"""What is known of rows before they are answered: that they can be read twice, their columns, and what a table cannot write."""

from __future__ import annotations

from pathlib import Path

from lorakeet.data.locate import locate_data
from lorakeet.data.predicted.written_records import TABLES, WORKBOOK, TableForm, can_write, cell_text
from lorakeet.data.read import is_hub_id
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.errors import DataError


def require_rereadable(name: str) -> None:
    """Raises DataError where `name` is missing, and where it is a pipe or a device, which can be read only once."""
    if is_hub_id(name):
        return
    bare, archive = name.partition("#")[0], name.partition(".zip!")
    places = [Path(place).expanduser() for place in (name, bare, archive[0] + ".zip" if archive[1] else name)]
    if name == "-" or any(path.exists() and not path.is_file() and not path.is_dir() for path in places):
        raise DataError(
            f"{name} is a pipe or a device; expected a regular file, since its rows are read before and while they are answered. "
            "Write them to a file, and name that."
        )
    if not places[1].is_dir():
        locate_data(name)


class Contents:
    """What the records of a file have in all, which `out` will have: each column once, in the order in which they come.

    `fits` is false once a table has a cell or a column that its encoding cannot write. Half of a character, which no table can
    have, is added to `problems`.
    """

    def __init__(self, form: TableForm, out: Path, problems: RowProblems) -> None:
        self.columns: dict[str, None] = {}
        self.fits = True
        self._encoding, self._problems = form.encoding, problems
        self._table = out.suffix.lower() in (*TABLES, WORKBOOK)

    def add(self, record: FileRecord) -> None:
        """Takes one more record into account."""
        new = [column for column in record.values if column not in self.columns]
        self.columns.update(dict.fromkeys(new))
        if not self._table:
            return
        cells = {column: cell_text(value) for column, value in record.values.items()}
        if can_write(self._encoding, "".join([*new, *cells.values()])):
            return
        halves = [column for column in cells if not can_write("utf-8", column + cells[column])]
        if not halves:
            self.fits = False
            return
        self._problems.add(
            record.source,
            f"column {halves[0]!r} has half of a character, which no table can have; name a .jsonl file as --out, which keeps "
            "it, or mend the row.",
        )
