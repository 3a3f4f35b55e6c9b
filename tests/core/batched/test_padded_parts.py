"""Parts with factors of their own, multiplied together, equal one at a time; few products whatever their number."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lorakeet.core.batched.padded_parts import PaddedPart, padded

IN, OUTS = 12, (10, 4)
CPU = torch.device("cpu")


def parts_of(tokens: Sequence[Sequence[int]], ranks: Sequence[tuple[int, int]], gap: int = 0) -> list[PaddedPart]:
    """Parts whose rows stand one below the other, with `gap` rows of nobody between them."""
    found, above, below = [], 0, [0, 0]
    for own, (first, second) in zip(tokens, ranks, strict=True):
        of_b = (slice(below[0], below[0] + first), slice(below[1], below[1] + second))
        found.append(PaddedPart(own, slice(above, above + first + second), of_b))
        above += first + second + gap
        below = [below[0] + first + gap, below[1] + second + gap]
    return found


def numbers(count: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """x, A, the B's and the y's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, IN, generator=generator)
    A = torch.randn(100, IN, generator=generator)
    return (
        x,
        A,
        [torch.randn(100, out, generator=generator) for out in OUTS],
        [torch.randn(count, out, generator=generator) for out in OUTS],
    )


def one_at_a_time(parts: Sequence[PaddedPart], x: Tensor, A: Tensor, Bs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    found = [y.clone() for y in ys]
    for part in parts:
        first = part.of_a.start
        for y, B, rows, rank in zip(found, Bs, part.of_b, part.ranks, strict=True):
            for token in part.tokens:
                y[token] += (x[token] @ A[first : first + rank].T) @ B[rows]
            first += rank
    return found


@pytest.mark.parametrize(
    ("tokens", "ranks", "gap", "groups"),
    [
        ([range(0, 5), range(5, 10), range(10, 15)], [(2, 3)] * 3, 0, 1),  # equal lengths, neighbours: views alone
        ([range(0, 5), range(5, 9), range(9, 14)], [(2, 3)] * 3, 2, 1),  # unequal lengths, rows apart
        ([range(3, 8), [0, 1, 2, 9, 11]], [(2, 3)] * 2, 0, 1),  # tokens apart
        ([range(0, 12), range(12, 16)], [(2, 3)] * 2, 0, 2),  # too unequal
        ([range(0, 5), range(5, 10)], [(2, 3), (3, 3)], 0, 2),  # other ranks
        ([range(0, 5), range(6, 11)], [(2, 0), (2, 0)], 1, 1),  # nothing on the second layer
        ([range(0, 5), range(6, 11)], [(0, 0), (2, 1)], 0, 1),  # nothing at all for the first part
        ([range(4, 9)], [(2, 1)], 0, 1),
    ],
)
def test_equals_one_part_at_a_time(tokens: list[Sequence[int]], ranks: list[tuple[int, int]], gap: int, groups: int) -> None:
    parts = parts_of(tokens, ranks, gap)
    x, A, Bs, ys = numbers(16)
    expected = one_at_a_time(parts, x, A, Bs, ys)
    found = padded(parts, CPU)
    assert len(found) == groups
    for group in found:
        group.add(ys, x, A, Bs)
    for ours, theirs in zip(ys, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_fills_up_reaches_no_row_even_where_it_is_no_number() -> None:
    parts = parts_of([range(0, 5), range(5, 9)], [(2, 3)] * 2)
    x, A, Bs, ys = numbers(9)
    x[8] = float("nan")  # the token that fills up the second part
    (group,) = padded(parts, CPU)
    group.add(ys, x, A, Bs)
    assert all(y[:8].isfinite().all() and y[8].isnan().all() for y in ys)
