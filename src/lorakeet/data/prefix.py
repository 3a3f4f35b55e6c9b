"""Tokens that all rows of a batch begin with, laid out once: a causal model computes the same states for them in every row.

A template's first words, a system prompt, instructions: what depends on them alone, gradients included, is the sum over the rows
that share them. The rest of each row follows with the positions that it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import Tensor

from lorakeet.data.chat import Example, Ids
from lorakeet.data.pack import Batch, even_bins, pack_examples


@dataclass(frozen=True, eq=False)
class PrefixLayout:
    """A batch as a model sees it: `prefix` tokens that belong to every row, then the `lengths` tokens that are a row's own."""

    ids: Tensor  # (tokens,) int64
    positions: Tensor  # (tokens,) int64, of each token in its row
    lengths: tuple[int, ...]
    prefix: int
    target_positions: Tensor  # (targets,) int64: where a target is to be predicted


def unshared_layout(batch: Batch) -> PrefixLayout:
    """The batch as it is, nothing shared."""
    return PrefixLayout(batch.ids, batch.positions, batch.lengths, 0, batch.target_positions)


def shared_layout(batch: Batch) -> PrefixLayout:
    """The batch with the tokens that all its rows begin with laid out once; each row keeps at least its last token."""
    prefix = _shared(batch)
    if not prefix:
        return unshared_layout(batch)
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


PASS = 128  # tokens that take about as long as what a pass takes beside its tokens, where weights lie in memory
UNIT = 1 << 40  # of a batch: what fills it, whichever of the limits that is
DEPTH = 16  # prompts within prompts


@dataclass(frozen=True)
class BatchLimits:
    """What a batch may have: tokens that are computed, and learnt ones; `times` as many in all. A pass costs `a_pass` tokens."""

    tokens: int
    times: int = 1
    a_pass: int = PASS


def prefix_batches(examples: Sequence[Example], limits: BatchLimits) -> list[Batch]:
    """The examples of one step in batches within the limits, what all rows of a batch begin with counted once; a longer row
    stands alone. The same batches for the same examples."""
    rows = _SortedRows(examples, limits)
    plain = even_bins([len(example.ids) for example in examples], limits.tokens)
    apart = [[rows.numbers[place] for place in chosen] for group in rows.groups() for chosen in rows.cut(group)]
    return [pack_examples([examples[number] for number in sorted(chosen)]) for chosen in min((plain, apart), key=rows.computed)]


class _SortedRows:
    """The examples by their place in the order of their tokens; places of a group ascend."""

    def __init__(self, examples: Sequence[Example], limits: BatchLimits) -> None:
        keys = [example.ids.astype(">u8").tobytes() for example in examples]  # bytes in the order of the numbers
        self.numbers = sorted(range(len(examples)), key=lambda number: (keys[number], number))
        self.places = {number: place for place, number in enumerate(self.numbers)}
        self.ids = [examples[number].ids for number in self.numbers]
        self.lengths = np.array([len(ids) for ids in self.ids], np.int64)
        self.targets = np.array([int(examples[number].supervised.sum()) for number in self.numbers], np.int64)
        self.shared = np.array([_common(one, other) for one, other in pairwise(self.ids)], np.int64)  # of neighbours
        self.limits = limits

    def groups(self) -> list[list[int]]:
        """All rows, in groups."""
        return self._apart(range(len(self.numbers)), 0)

    def cut(self, group: Sequence[int]) -> list[list[int]]:
        """A group batch by batch."""
        shared = self._beginning(group)
        if not shared:
            bins = even_bins(self.lengths[list(group)].tolist(), self.limits.tokens)
        else:
            bins = even_bins(self._filling(list(group), shared).tolist(), UNIT, UNIT >> 12)
        return [sorted(group[place] for place in chosen) for chosen in bins]

    def computed(self, batches: Sequence[Sequence[int]]) -> int:
        """Tokens of examples, by their numbers, that are computed in these batches, and what the passes cost."""
        found = 0
        for chosen in batches:
            places = sorted(self.places[number] for number in chosen)
            shared = self._beginning(places)
            found += int((self.lengths[places] - shared).sum()) + shared + self.limits.a_pass
        return found

    def _apart(self, rows: range, depth: int) -> list[list[int]]:
        """Neighbours, those of them that are better by themselves in groups of their own."""
        shared = self._beginning(rows)
        saved = {part: int((self.shared[part.start : part.stop - 1] - shared).sum()) for part in self._parts(rows, shared)}
        found: list[list[int]] = []
        gone = np.zeros(len(rows), bool)
        rest = self._cost(rows, shared)
        for part in sorted(saved, key=lambda part: (-saved[part], part.start)):
            if saved[part] <= self.limits.a_pass or depth == DEPTH:  # at most
                break
            own = self._apart(part, depth + 1)
            left = rest.without(self._cost(part, shared))
            if sum(self._cost(group, self._beginning(group)).all for group in own) + left.all < rest.all:
                found += own
                gone[part.start - rows.start : part.stop - rows.start] = True
                rest = left
        others = [place for place in rows if not gone[place - rows.start]]
        return [*found, others] if others else found

    def _parts(self, rows: range, shared: int) -> Iterator[range]:
        """Those of the neighbours that go on with the same token behind what all of them share, two or more."""
        longer = [place for place in rows if self.lengths[place] > shared + 1]
        for _, alike in groupby(longer, key=lambda place: int(self.ids[place][shared])):
            places = list(alike)
            if len(places) > 1:
                yield range(places[0], places[-1] + 1)

    def _cost(self, group: Sequence[int], shared: int) -> _Cost:
        """What the group costs if so many tokens of its beginning count once for each pass."""
        places = list(group)
        own = int((self.lengths[places] - shared).sum())
        return _Cost(len(places), own, int(self._filling(places, shared).sum()), shared + self.limits.a_pass)

    def _beginning(self, group: Sequence[int]) -> int:
        """How many tokens all rows begin with, each of which keeps its last one; 0 for a row by itself."""
        if len(group) < 2:
            return 0
        return min(_common(self.ids[group[0]], self.ids[group[-1]]), max(0, int(self.lengths[list(group)].min()) - 1))

    def _filling(self, places: list[int], shared: int) -> Ids:
        """How much of a batch that has the beginning already each row fills, in UNITs: of its tokens, its targets, or of all."""
        lengths, most = self.lengths[places], self.limits.tokens
        own = (lengths - shared) * UNIT // max(1, most - shared)
        filling = np.maximum(np.maximum(own, self.targets[places] * UNIT // most), lengths * UNIT // (self.limits.times * most))
        return np.minimum(filling, UNIT + 1)  # a longer one stands alone, however long it is


@dataclass(frozen=True)
class _Cost:
    """Of a group: rows, tokens of their own, how many UNITs they fill, and what each pass adds."""

    rows: int
    own: int
    filling: int
    each: int

    def without(self, part: _Cost) -> _Cost:
        return _Cost(self.rows - part.rows, self.own - part.own, self.filling - part.filling, self.each)

    @property
    def all(self) -> int:
        """In tokens."""
        return self.own + min(self.rows, -(-self.filling // UNIT)) * self.each


def _common(one: Ids, other: Ids) -> int:
    """How many tokens both begin with; one fewer than the shorter one has, at most."""
    most = max(0, min(len(one), len(other)) - 1)
    differ = np.flatnonzero(one[:most] != other[:most])
    return int(differ[0]) if len(differ) else most
