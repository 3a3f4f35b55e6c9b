"""Joint batches: the rows of several adapters' steps that go through the base in one forward and backward pass.

    a small step   packed with those of other members, so that the base's weights are read once for all
    any other      alone, in the micro-batches of a single run, which are as fast and share prefixes

The batches of a member are consecutive, so that its step is taken, and its gradients dropped, before the next member's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorakeet.data.pack import Batch

SMALL = 512  # most tokens of a step that joins others


@dataclass(frozen=True)
class JointBatch:
    """Rows in one forward and backward pass: (number of the member, its rows)."""

    parts: tuple[tuple[int, Batch], ...]

    @property
    def alone(self) -> int | None:
        """The member, if all rows are of one."""
        return self.parts[0][0] if len(self.parts) == 1 else None

    @property
    def batch(self) -> Batch:
        """All rows, packed."""
        return self.parts[0][1] if len(self.parts) == 1 else join_batches([batch for _, batch in self.parts])


@dataclass(frozen=True)
class Group:
    """Members whose gradients are complete after these batches."""

    members: tuple[int, ...]
    batches: tuple[JointBatch, ...]


def groups_of(steps: Sequence[Sequence[Batch]], tokens: int) -> list[Group]:
    """Groups the members' steps, each a list of micro-batches, into joint batches; each member is in one group.

    Small steps share batches of about equal size, at most `tokens` tokens. Micro-batches without a target are left out.
    """
    filled = [(index, [batch for batch in step if batch.targets]) for index, step in enumerate(steps)]
    small = [(index, batches[0]) for index, batches in filled if len(batches) == 1 and batches[0].tokens <= SMALL]
    shared = {index for index, _ in small}
    found = [Group(tuple(index for index, _ in parts), (JointBatch(tuple(parts)),)) for parts in _packed(small, tokens)]
    others = ((index, batches) for index, batches in filled if index not in shared)
    return found + [Group((index,), tuple(JointBatch(((index, batch),)) for batch in batches)) for index, batches in others]


def merge_groups(groups: Sequence[Group]) -> Group:
    """All members and batches in one group, for a streamed base."""
    return Group(
        tuple(index for group in groups for index in group.members), tuple(one for group in groups for one in group.batches)
    )


def _packed(small: Sequence[tuple[int, Batch]], tokens: int) -> list[list[tuple[int, Batch]]]:
    """Splits, in order, into the fewest parts of at most `tokens` tokens, or one more; a longer batch is its own part."""
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
    """Packs several batches into one; targets keep the order of the batches."""
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
