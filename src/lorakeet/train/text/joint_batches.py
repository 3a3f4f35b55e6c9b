"""Which rows of several adapters' steps go through the base together.

    a small step   whole, beside those of other members, laid end to end: the base's weights are read once for all of them
    any other      by itself, in the micro-batches of its single run, which are as fast, and share what rows begin with

A member's passes follow one another, so that its step can be taken, and its gradients forgotten, before the next member's begin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorakeet.data.pack import Batch

SMALL = 512  # tokens of a step, up to which it is computed beside others


@dataclass(frozen=True)
class JointBatch:
    """Rows that go through the base together: (number of the member, its rows)."""

    parts: tuple[tuple[int, Batch], ...]

    @property
    def alone(self) -> int | None:
        """The member whose rows these are, if they are of one."""
        return self.parts[0][0] if len(self.parts) == 1 else None

    @property
    def batch(self) -> Batch:
        """All rows; those of one member as they are."""
        return self.parts[0][1] if len(self.parts) == 1 else join_batches([batch for _, batch in self.parts])


@dataclass(frozen=True)
class Group:
    """Members whose gradients are all there after these passes."""

    members: tuple[int, ...]
    passes: tuple[JointBatch, ...]


def groups_of(steps: Sequence[Sequence[Batch]], tokens: int) -> list[Group]:
    """The members' steps, each in its micro-batches, as passes; each member is in one group.

    Small steps share passes of about equal size, of `tokens` tokens at most. Micro-batches without a target are left out.
    """
    filled = [(index, [batch for batch in step if batch.targets]) for index, step in enumerate(steps)]
    small = [(index, batches[0]) for index, batches in filled if len(batches) == 1 and batches[0].tokens <= SMALL]
    shared = {index for index, _ in small}
    found = [Group(tuple(index for index, _ in parts), (JointBatch(tuple(parts)),)) for parts in _dealt(small, tokens)]
    others = ((index, batches) for index, batches in filled if index not in shared)
    return found + [Group((index,), tuple(JointBatch(((index, batch),)) for batch in batches)) for index, batches in others]


def merge_groups(groups: Sequence[Group]) -> Group:
    """All members and passes, for a base whose blocks come in once for all of them."""
    return Group(
        tuple(index for group in groups for index in group.members), tuple(one for group in groups for one in group.passes)
    )


def _dealt(small: Sequence[tuple[int, Batch]], tokens: int) -> list[list[tuple[int, Batch]]]:
    """In their order, in as few parts of at most `tokens` tokens as they need, or one more; a longer batch is one by itself."""
    whole = sum(batch.tokens for _, batch in small)
    enough = whole / max(1, math.ceil(whole / tokens))
    found: list[list[tuple[int, Batch]]] = []
    count = 0
    for index, batch in small:
        if not found or count >= enough or count + batch.tokens > tokens:
            found.append([])
            count = 0
        found[-1].append((index, batch))
        count += batch.tokens
    return found


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Several batches as one, end to end; the targets stay in the batches' order."""
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + batch.tokens)
    return Batch(
        ids=torch.cat([batch.ids for batch in batches]),
        lengths=tuple(length for batch in batches for length in batch.lengths),
        target_positions=torch.cat([batch.target_positions + start for batch, start in zip(batches, starts, strict=False)]),
        target_ids=torch.cat([batch.target_ids for batch in batches]),
        keys=tuple(key for batch in batches for key in batch.keys),
    )
