"""Splits a pair of a fused weight, such as q, k and v stacked by rows, into pairs of its parts, and joins them.

    W = [W₁; …; Wₙ] by rows      ΔW = s·B·A is split by the rows of B: ΔWᵢ = s·Bᵢ·A
    joined from pairs            A = [A₁; …; Aₙ], B = diag(s₁B₁, …, sₙBₙ); where all Aᵢ are equal, A = A₁ and B = [B₁; …; Bₙ]

Both are exact. A zero column of Bᵢ adds nothing to ΔWᵢ, so splitting drops it with its row of A: from a block-diagonal B every
part gets its own rank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lorakeet.core.adapter import Pair


def split(pair: Pair, rows: Sequence[int]) -> list[Pair | None]:
    """The pairs of the parts with the given numbers of `rows`; None for a part that the pair does not change.

    A pair that changes nothing becomes one of every part. The scale stays; magnitudes are split by rows.
    """
    blocks = split_by_rows(pair.B, rows)
    live = [part.flatten(1).any(0) for part in blocks]
    nothing = not bool(torch.stack(live).any())
    lengths = [None] * len(rows) if pair.magnitude is None else split_by_rows(pair.magnitude, rows)
    found: list[Pair | None] = []
    for B, columns, magnitude in zip(blocks, live, lengths, strict=True):
        if nothing or bool(columns.all()) or (magnitude is not None and not bool(columns.any())):
            found.append(dataclasses.replace(pair, B=B.contiguous(), magnitude=magnitude))
        elif bool(columns.any()):
            A, rank = pair.A[columns], int(columns.sum())
            found.append(Pair(A, B[:, columns].contiguous(), pair.scale * rank, pair.kind, magnitude=magnitude))
        else:
            found.append(None)
    return found


def split_by_rows(tensor: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Splits `tensor` into parts with the given numbers of `rows`."""
    return [tensor[end - height : end] for end, height in zip(itertools.accumulate(rows), rows, strict=True)]


def join_pairs(pairs: Sequence[Pair | None], rows: Sequence[int]) -> Pair:
    """One pair for the stacked parts; `rows`: the rows of each; None: a part without a pair.

    The scale is that of all parts, or 1 if they differ and are multiplied into B. ValueError if only some are DoRA.
    """
    there = [pair for pair in pairs if pair is not None]
    lengths = [pair.magnitude for pair in there if pair.magnitude is not None]
    if lengths and len(lengths) < len(pairs):
        raise ValueError("only some parts are DoRA")
    scale = there[0].scale if len({pair.scale for pair in there}) == 1 else None
    first = there[0].A
    shared = all(pair.A.shape == first.shape and torch.equal(pair.A, first) for pair in there)
    A = first if shared else torch.cat([pair.A for pair in there])
    blocks: list[Tensor] = []
    column = 0
    for pair, height in zip(pairs, rows, strict=True):
        block = A.new_zeros(height, A.shape[0])
        if pair is not None:
            start = 0 if shared else column
            block[:, start : start + pair.rank] = pair.B if scale is not None else pair.B * pair.scale
            column += pair.rank
        blocks.append(block)
    magnitude = torch.cat(lengths) if lengths else None
    return Pair(A, torch.cat(blocks), (1.0 if scale is None else scale) * A.shape[0], "linear", magnitude=magnitude)


def swapped(pair: Pair) -> Pair:
    """The pair with the two halves of its rows exchanged."""
    half = pair.B.shape[0] // 2
    magnitude = None if pair.magnitude is None else pair.magnitude.roll(half, 0)
    return dataclasses.replace(pair, B=pair.B.roll(half, 0), magnitude=magnitude)


def rows_of_parts(parts: int, width: int, total: int) -> list[int] | None:
    """The rows of each part of `total`: equal for q, k and v; a fourth part, FLUX's MLP, has the rest after three of `width`.

    None if they do not add up.
    """
    if parts <= 3:
        return [total // parts] * parts if total % parts == 0 else None
    rest = total - 3 * width
    return [width, width, width, rest] if rest > 0 else None
