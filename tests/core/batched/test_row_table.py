"""Rows of a table by owner: spans between others, and none that is not free."""

from __future__ import annotations

import torch

from lorakeet.core.batched.row_table import RowTable


def test_spans_are_taken_freed_and_kept() -> None:
    table = RowTable(3, torch.float32, torch.device("cpu"))
    assert table.take(0, 0) and not table.take(1, 1), "no row yet"
    table.remake(10, ())
    assert [table.take(owner, count) for owner, count in ((1, 4), (2, 0), (3, 2), (4, 4), (5, 1))] == [True] * 4 + [False]
    assert table.take(1, 4) and not table.take(1, 3), "had already"
    for owner, span in table.spans.items():
        table.numbers[span] = float(owner)
    table.free(3)
    table.free(9)
    assert not table.take(6, 3) and table.take(6, 2) and table.spans[6] == slice(4, 6)
    table.free(1)
    table.remake(7, [4, 2])
    assert table.spans == {4: slice(0, 4), 2: slice(4, 4)} and table.numbers.shape == (7, 3)
    assert table.numbers[:4].eq(4).all() and table.take(7, 3) and not table.take(8, 1)


def test_tables_can_be_written_to_wherever_they_were_made() -> None:
    with torch.inference_mode():
        table = RowTable(3, torch.float32, torch.device("cpu"))
        table.remake(2, ())
    table.numbers.fill_(1.0)
    assert table.numbers.sum() == 6
