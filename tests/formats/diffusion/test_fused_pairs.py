"""Splitting and joining by rows are exact: every part's ΔW is its rows of the whole's, and ranks come back."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lorakeet.core.adapter import Pair
from lorakeet.formats.diffusion.fused_pairs import join_pairs, rows_of_parts, split, swapped
from tiny.adapters import random_pair

ROWS = [6, 6, 10]


def pairs(*ranks: int, alphas: tuple[float, ...] = (12.0, 20.0, 3.0)) -> list[Pair]:
    torch.manual_seed(1)
    sizes = zip(ranks, alphas, ROWS, strict=True)
    return [random_pair("linear", torch.randn(rows, 6), rank=rank, alpha=alpha) for rank, alpha, rows in sizes]


def test_mixed_ranks_and_alphas_join_block_by_block_and_come_back() -> None:
    parts = pairs(2, 4, 3)
    whole = join_pairs(parts, ROWS)
    assert (whole.rank, whole.scale) == (9, 1.0)
    torch.testing.assert_close(whole.delta(), torch.cat([part.delta() for part in parts]))
    assert int((whole.B != 0).sum()) == 6 * 2 + 6 * 4 + 10 * 3
    back = split(whole, ROWS)
    for part, found in zip(parts, back, strict=True):
        assert found is not None and found.rank == part.rank and torch.equal(found.A, part.A)
        torch.testing.assert_close(found.delta(), part.delta())


def test_one_scale_for_all_stays_the_scale_and_the_factors_their_bits() -> None:
    parts = pairs(2, 4, 3, alphas=(6.0, 12.0, 9.0))
    whole = join_pairs(parts, ROWS)
    assert whole.scale == 3.0
    for part, found in zip(parts, split(whole, ROWS), strict=True):
        assert found is not None and found.scale == 3.0 and torch.equal(found.A, part.A) and torch.equal(found.B, part.B)


def test_a_part_without_a_pair_has_no_rows_and_none_comes_back() -> None:
    first, _, last = pairs(2, 4, 3)
    whole = join_pairs([first, None, last], ROWS)
    assert whole.rank == 5 and not bool(whole.B[6:12].any())
    found = split(whole, ROWS)
    assert found[1] is None and [pair.rank for pair in found if pair] == [2, 3]


def test_one_A_for_all_is_kept_once() -> None:
    torch.manual_seed(2)
    dense = random_pair("linear", torch.randn(22, 6), rank=4, alpha=2.0)
    parts = split(dense, ROWS)
    assert all(part is not None and torch.equal(part.A, dense.A) and part.scale == 0.5 for part in parts)
    whole = join_pairs(parts, ROWS)
    assert (whole.rank, whole.alpha) == (4, 2.0) and torch.equal(whole.A, dense.A) and torch.equal(whole.B, dense.B)


def test_a_pair_that_changes_nothing_is_given_to_every_part() -> None:
    fresh = Pair(torch.randn(4, 6), torch.zeros(22, 4), 8.0)
    parts = split(fresh, ROWS)
    assert [part.rank if part else None for part in parts] == [4, 4, 4]


def test_dora_lengths_go_by_rows_and_must_be_on_all() -> None:
    torch.manual_seed(3)
    parts = [random_pair("linear", torch.randn(rows, 6), rank=2, dora=True) for rows in ROWS]
    whole = join_pairs(parts, ROWS)
    for part, found in zip(parts, split(whole, ROWS), strict=True):
        assert found is not None and part.magnitude is not None and found.magnitude is not None
        assert torch.equal(found.magnitude, part.magnitude)
    still = dataclasses.replace(parts[1], B=torch.zeros_like(parts[1].B))  # rescales its rows although B is 0
    assert split(join_pairs([parts[0], still, parts[2]], ROWS), ROWS)[1] is not None
    with pytest.raises(ValueError, match="only some parts"):
        join_pairs([parts[0], None, parts[2]], ROWS)


def test_halves_of_rows_are_exchanged_with_their_lengths() -> None:
    torch.manual_seed(4)
    pair = random_pair("linear", torch.randn(8, 4), dora=True)
    other = swapped(pair)
    assert pair.magnitude is not None and other.magnitude is not None
    assert torch.equal(other.B, torch.cat([pair.B[4:], pair.B[:4]])) and torch.equal(other.magnitude[:4], pair.magnitude[4:])
    assert torch.equal(swapped(other).B, pair.B)


@pytest.mark.parametrize(
    ("parts", "width", "total", "expected"),
    [
        (3, 8, 24, [8, 8, 8]), (3, 8, 25, None), (2, 9, 8, [4, 4]), (4, 8, 56, [8, 8, 8, 32]), (4, 8, 40, [8, 8, 8, 16]),
        (4, 8, 24, None),
    ],
)  # fmt: skip
def test_rows_of_parts(parts: int, width: int, total: int, expected: list[int] | None) -> None:
    assert rows_of_parts(parts, width, total) == expected
