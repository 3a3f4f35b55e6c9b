"""`replying.rows_file`: how the new columns of a table are written."""

from __future__ import annotations

import pytest

from lorakeet.data.predicted.written_records import TableForm
from lorakeet.data.tables import FileRecord
from lorakeet.replying.rows_file import table_decimal


@pytest.mark.parametrize(
    ("delimiter", "cells", "mark"),
    [
        (";", ("1,5", "-2,25"), ","), (";", ("1.234,50", "x"), ","), (",", ("0,5", ""), ","), (";", ("12", "1.2.2024"), ","),
        (";", ("1.5", "2"), "."), (",", ("a", "1.234"), "."), (";", ("1.234", "7"), ","), (",", (1.5, None), "."),
    ],
)  # fmt: skip
def test_new_numbers_have_the_decimal_mark_of_the_table(delimiter: str, cells: tuple[object, ...], mark: str) -> None:
    records = [FileRecord("a.csv:2", {str(place): cell for place, cell in enumerate(cells)})]
    assert table_decimal(records, TableForm(delimiter)) == mark
