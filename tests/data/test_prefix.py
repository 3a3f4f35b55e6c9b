"""Tokens that all rows begin with are laid out once, and every token keeps its place and position."""

from __future__ import annotations

import pytest
import torch

from lorakeet.data.pack import Batch
from lorakeet.data.prefix import as_laid, shared_once


def batch(*rows: list[int]) -> Batch:
    """Rows of ids, the last token but one of each predicting the last."""
    lengths = [len(row) for row in rows]
    ends = torch.tensor(lengths).cumsum(0)
    ids = torch.tensor([token for row in rows for token in row])
    return Batch(ids, tuple(lengths), ends - 2, ids[ends - 1], tuple(map(str, range(len(rows)))))


def test_a_shared_beginning_stands_once() -> None:
    laid = shared_once(batch([7, 8, 1, 2, 3], [7, 8, 4], [7, 8, 5, 6]))
    assert laid.ids.tolist() == [7, 8, 1, 2, 3, 4, 5, 6]
    assert laid.positions.tolist() == [0, 1, 2, 3, 4, 2, 2, 3]
    assert (laid.prefix, laid.lengths) == (2, (3, 1, 2))
    assert laid.ids[laid.target_positions].tolist() == [2, 8, 5]  # the second row's target is predicted at the prefix's end


@pytest.mark.parametrize("rows", [([1, 2, 3],), ([1, 2], [3, 2]), ([5], [5, 6])])
def test_nothing_is_shared_by_one_row_by_different_ones_or_by_a_row_that_would_keep_nothing(rows: tuple[list[int], ...]) -> None:
    whole = (
        batch(*rows)
        if all(len(row) > 1 for row in rows)
        else Batch(torch.tensor([5, 5, 6]), (1, 2), torch.tensor([1]), torch.tensor([6]), ("0", "1"))
    )
    laid, plain = shared_once(whole), as_laid(whole)
    assert laid.prefix == 0
    assert laid.lengths == plain.lengths == whole.lengths
    assert torch.equal(laid.ids, whole.ids)


def test_every_row_keeps_its_last_token() -> None:
    laid = shared_once(batch([1, 2, 3], [1, 2, 3], [1, 2, 3]))
    assert (laid.prefix, laid.lengths) == (2, (1, 1, 1))
    assert laid.ids.tolist() == [1, 2, 3, 3, 3]
    assert laid.target_positions.tolist() == [1, 1, 1]
