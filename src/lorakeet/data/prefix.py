"""Shared prefixes: tokens at the start of all rows of a batch are computed once, since a causal model gives them equal states.

Examples are a template's first words, a system prompt, instructions. Gradients of the prefix are summed over the rows that share
it. The rest of each row follows at its own positions. Rows are batched so that prefixes are shared:

    order     rows sorted by tokens: neighbours have the longest common prefixes
    split     neighbours with a longer prefix form a group of their own if that saves more tokens than a forward pass costs
    batches   each group is split as in data/pack, its prefix counted once per batch

For example, at 2,048 tokens a batch, five rows of 100 tokens behind a prompt of 1,500 compute the prompt once. Never computes
more tokens than batches without sharing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from torch import Tensor

from lorakeet.data.chat import Example, Ids
from lorakeet.data.pack import Batch, even_bins, pack_examples
from lorakeet.kernels.host_copies import together_on


@dataclass(frozen=True, eq=False)
class PrefixLayout:
    """The layout of a batch: `prefix` tokens that belong to every row, then `lengths` own tokens of each row, then padding.

    It is computed on the host, and goes over to the batch's device at once.
    """

    ids: Tensor  # (tokens and padding,) int64
    positions: Tensor  # (tokens and padding,) int64, of each token in its row
    lengths: tuple[int, ...]
    prefix: int
    target_positions: Tensor  # (targets,) int64: where each target is predicted
    read: Tensor  # (n,) int64: the same places without repeats
    numbers: Ids  # (tokens and padding,): the ids on the host

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return self.prefix + sum(self.lengths)


def unshared_layout(batch: Batch, computed: Callable[[int], int] | None = None) -> PrefixLayout:
    """The layout of the batch without sharing; `computed` says how many tokens are computed for so many, padding included."""
    ids, targets, _ = batch.on_host()
    return _laid(batch, (ids, _positions(batch.lengths), targets), 0, computed)


def shared_layout(batch: Batch, computed: Callable[[int], int] | None = None) -> PrefixLayout:
    """The layout with the common prefix of all rows once; each row keeps at least its last token."""
    ids, targets, _ = batch.on_host()
    prefix = _shared(ids, batch.lengths)
    if not prefix:
        return unshared_layout(batch, computed)
    positions, rows = _positions(batch.lengths), np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    kept = (positions >= prefix) | (rows == 0)
    places = np.where(positions < prefix, positions, np.cumsum(kept) - 1)  # of each token: the first row has the prefix
    return _laid(batch, (ids[kept], positions[kept], places[targets]), prefix, computed)


def _laid(batch: Batch, numbers: tuple[Ids, Ids, Ids], prefix: int, computed: Callable[[int], int] | None) -> PrefixLayout:
    """The layout of ids, positions and target positions."""
    *of_tokens, targets = numbers
    padding = 0 if computed is None else computed(len(of_tokens[0])) - len(of_tokens[0])
    padded = [np.concatenate([each, np.zeros(padding, np.int64)]) if padding else each for each in of_tokens]
    read = np.unique(targets) if prefix else targets
    ids, positions, places, once = together_on([*padded, targets, read], batch.ids.device)
    return PrefixLayout(ids, positions, tuple(length - prefix for length in batch.lengths), prefix, places, once, padded[0])


def _positions(lengths: Sequence[int]) -> Ids:
    """Position of each token in its row."""
    return np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])


def _shared(ids: Ids, lengths: Sequence[int]) -> int:
    """Length of the common prefix of all rows; 0 for a single row."""
    most = min(lengths) - 1
    if len(lengths) < 2 or most < 1:
        return 0
    starts = np.cumsum([0, *lengths[:-1]])
    beginnings = ids[starts[:, None] + np.arange(most)]
    differ = np.flatnonzero((beginnings != beginnings[0]).any(0))
    return int(differ[0]) if len(differ) else most


PASS = 128  # fixed cost of a forward pass, in tokens, with weights in memory
UNIT = 1 << 40  # a full batch, in units of fill, whichever limit is reached first
DEPTH = 16  # deepest nesting of prefixes


@dataclass(frozen=True)
class BatchLimits:
    """Limits of a batch: `tokens` computed and target tokens each, `times` as many in all; a pass costs `a_pass` tokens."""

    tokens: int
    times: int = 1
    a_pass: int = PASS


def prefix_batches(examples: Sequence[Example], limits: BatchLimits) -> list[Batch]:
    """Splits the examples of one step into batches within the limits, common prefixes counted once. Deterministic.

    A row above the limits is a batch of its own."""
    rows = _SortedRows(examples, limits)
    plain = even_bins([len(example.ids) for example in examples], limits.tokens)
    grouped = [[rows.numbers[place] for place in chosen] for group in rows.groups() for chosen in rows.cut(group)]
    return [pack_examples([examples[number] for number in sorted(chosen)]) for chosen in min((plain, grouped), key=rows.computed)]


class _SortedRows:
    """The examples sorted by their tokens; a group is an ascending list of places in that order."""

    def __init__(self, examples: Sequence[Example], limits: BatchLimits) -> None:
        keys = [example.ids.astype(">u8").tobytes() for example in examples]  # big-endian bytes sort like the numbers
        self.numbers = sorted(range(len(examples)), key=lambda number: (keys[number], number))
        self.places = {number: place for place, number in enumerate(self.numbers)}
        self.ids = [examples[number].ids for number in self.numbers]
        self.lengths = np.array([len(ids) for ids in self.ids], np.int64)
        self.targets = np.array([int(examples[number].supervised.sum()) for number in self.numbers], np.int64)
        self.shared = np.array([common_prefix(one, other) for one, other in pairwise(self.ids)], np.int64)  # of neighbours
        self.limits = limits

    def groups(self) -> list[list[int]]:
        """All rows, in groups that share a prefix."""
        return self._split(range(len(self.numbers)), 0)

    def cut(self, group: Sequence[int]) -> list[list[int]]:
        """Splits a group into batches."""
        shared = self._prefix(group)
        if not shared:
            bins = even_bins(self.lengths[list(group)].tolist(), self.limits.tokens)
        else:
            bins = even_bins(self._filling(list(group), shared).tolist(), UNIT, UNIT >> 12)
        return [sorted(group[place] for place in chosen) for chosen in bins]

    def computed(self, batches: Sequence[Sequence[int]]) -> int:
        """The cost in tokens of batches of example numbers: computed tokens and forward passes."""
        found = 0
        for chosen in batches:
            places = sorted(self.places[number] for number in chosen)
            shared = self._prefix(places)
            found += int((self.lengths[places] - shared).sum()) + shared + self.limits.a_pass
        return found

    def _split(self, rows: range, depth: int) -> list[list[int]]:
        """Splits neighbours into groups where that lowers the cost."""
        shared = self._prefix(rows)
        saved = {part: int((self.shared[part.start : part.stop - 1] - shared).sum()) for part in self._parts(rows, shared)}
        found: list[list[int]] = []
        gone = np.zeros(len(rows), bool)
        rest = self._cost(rows, shared)
        for part in sorted(saved, key=lambda part: (-saved[part], part.start)):
            if saved[part] <= self.limits.a_pass or depth == DEPTH:  # the most that can be saved
                break
            own = self._split(part, depth + 1)
            left = rest.without(self._cost(part, shared))
            if sum(self._cost(group, self._prefix(group)).all for group in own) + left.all < rest.all:
                found += own
                gone[part.start - rows.start : part.stop - rows.start] = True
                rest = left
        others = [place for place in rows if not gone[place - rows.start]]
        return [*found, others] if others else found

    def _parts(self, rows: range, shared: int) -> Iterator[range]:
        """Yields two or more neighbours that continue with the same token after the common prefix."""
        longer = [place for place in rows if self.lengths[place] > shared + 1]
        for _, same in groupby(longer, key=lambda place: int(self.ids[place][shared])):
            places = list(same)
            if len(places) > 1:
                yield range(places[0], places[-1] + 1)

    def _cost(self, group: Sequence[int], shared: int) -> _Cost:
        """The cost of the group if a prefix of `shared` tokens counts once per batch."""
        places = list(group)
        own = int((self.lengths[places] - shared).sum())
        return _Cost(len(places), own, int(self._filling(places, shared).sum()), shared + self.limits.a_pass)

    def _prefix(self, group: Sequence[int]) -> int:
        """Length of the common prefix of all rows, less than each row's length; 0 for a single row."""
        if len(group) < 2:
            return 0
        return min(common_prefix(self.ids[group[0]], self.ids[group[-1]]), max(0, int(self.lengths[list(group)].min()) - 1))

    def _filling(self, places: list[int], shared: int) -> Ids:
        """The share of a batch with the prefix that each row fills, in UNITs: the greatest of tokens, targets and total."""
        lengths, most = self.lengths[places], self.limits.tokens
        own = (lengths - shared) * UNIT // max(1, most - shared)
        filling = np.maximum(np.maximum(own, self.targets[places] * UNIT // most), lengths * UNIT // (self.limits.times * most))
        return np.minimum(filling, UNIT + 1)  # a longer row gets a batch of its own


@dataclass(frozen=True)
class _Cost:
    """The cost of a group: rows, own tokens, UNITs that they fill, and tokens that each batch adds."""

    rows: int
    own: int
    filling: int
    each: int

    def without(self, part: _Cost) -> _Cost:
        return _Cost(self.rows - part.rows, self.own - part.own, self.filling - part.filling, self.each)

    @property
    def all(self) -> int:
        """The total in tokens."""
        return self.own + min(self.rows, -(-self.filling // UNIT)) * self.each


def common_prefix(one: Ids, other: Ids) -> int:
    """Length of the common prefix of two rows' tokens (n,), less than the shorter row."""
    most = max(0, min(len(one), len(other)) - 1)
    differ = np.flatnonzero(one[:most] != other[:most])
    return int(differ[0]) if len(differ) else most
