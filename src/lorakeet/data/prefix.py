"""Tokens that all rows of a batch begin with, laid out once: a causal model computes the same states for them in every row.

A template's first words, a system prompt, instructions: what depends on them alone, gradients included, is the sum over the rows
that share them. The rest of each row follows with the positions that it had.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.data.pack import Batch


@dataclass(frozen=True, eq=False)
class PrefixLayout:
    """A batch as a model sees it: `prefix` tokens that belong to every row, then the `lengths` tokens that are a row's own."""

    ids: Tensor  # (tokens,) int64
    positions: Tensor  # (tokens,) int64, of each token in its row
    lengths: tuple[int, ...]
    prefix: int
    target_positions: Tensor  # (targets,) int64: where a target is to be predicted


def as_laid(batch: Batch) -> PrefixLayout:
    """The batch as it is, nothing shared."""
    return PrefixLayout(batch.ids, batch.positions, batch.lengths, 0, batch.target_positions)


def shared_once(batch: Batch) -> PrefixLayout:
    """The batch with the tokens that all its rows begin with laid out once; each row keeps at least its last token."""
    prefix = _shared(batch)
    if not prefix:
        return as_laid(batch)
    starts = torch.cumsum(torch.tensor([0, *batch.lengths]), 0)
    kept = torch.ones(batch.tokens, dtype=torch.bool)
    for start in starts[1:-1].tolist():
        kept[start : start + prefix] = False
    places = torch.cumsum(kept, 0) - 1  # of each token that is kept
    positions = batch.positions.cpu()
    places = torch.where(positions < prefix, positions, places)  # a token of the prefix stands where the first row's stands
    kept, places = kept.to(batch.ids.device), places.to(batch.ids.device)
    return PrefixLayout(
        ids=batch.ids[kept],
        positions=batch.positions[kept],
        lengths=tuple(length - prefix for length in batch.lengths),
        prefix=prefix,
        target_positions=places[batch.target_positions],
    )


def _shared(batch: Batch) -> int:
    """How many tokens all rows begin with; 0 for a single row."""
    most = min(batch.lengths) - 1
    if len(batch.lengths) < 2 or most < 1:
        return 0
    beginnings = torch.stack([row[:most] for row in batch.ids.split(list(batch.lengths))])  # type: ignore[no-untyped-call]
    return int((beginnings == beginnings[0]).all(0).cumprod(0).sum())
