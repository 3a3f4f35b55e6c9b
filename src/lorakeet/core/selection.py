"""Which adapter is active: one Selection for all adapted layers of a model, so that switching is one assignment."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol, cast

import torch
from torch import Tensor

Mix = tuple[tuple[str, float], ...]  # the adapters that a token uses, with weights
MixState = tuple[Mix, tuple[int | None, ...]]  # a mix, and the change at which each of its adapters was last attached
Run = tuple[int, int, Mix]  # the units start … stop − 1 use one mix
PATIENCE = 64  # batches in a row that need less than half of the memory, after which it is freed
_STATES = "states"
FEW = 16  # up to so many tokens of one mix gather their rows one by one; more are multiplied together


@dataclass(frozen=True)
class Share:
    """The units start … stop − 1 of a batch use `name` with `weight`; weight 1 is the adapter as it is.

    A unit is a token of packed rows, or a row of a padded batch.
    """

    start: int
    stop: int
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class BatchAssignment:
    """A divided batch as layers compute it: each mix has a slot in which its pairs are stored.

    `places` are the mixes by slot, some of them not in use; `used` are the slots in use. `long` are the tokens of a mix that has
    many, with its slot. `at` are the other tokens that have a mix, with its slot: the `tokens` (k,), or all of them if that is
    None. `picked` caches what layers derive from this, by what it depends on.
    """

    places: tuple[Mix, ...]
    used: frozenset[int]
    long: tuple[tuple[Sequence[int], int], ...]
    at: tuple[tuple[int, int], ...]  # (token, place)
    tokens: Tensor | None
    picked: dict[Hashable, object] = field(default_factory=dict, compare=False)


class Tables(Protocol):
    """Copies of pairs that layers store for divided batches."""

    bytes: int

    def release(self) -> None:
        """Frees them."""
        ...


class Selection:
    """The adapter that all units use (`active`), or the `shares` of a batch of `units` whose units use different ones."""

    def __init__(self) -> None:
        self.active: str | None = None
        self.shares: tuple[Share, ...] | None = None
        self.units = 0
        self.changes = 0  # counts adapters that were attached to or detached from a layer
        self.attached_at: dict[str, int] = {}  # `changes` at the last such event, by adapter
        self._numbers = itertools.count(1)
        self._places: tuple[Mix, ...] = ()
        self._runs: tuple[Run, ...] | None = None  # of the shares; computed on first use
        self._assignments: dict[tuple[int, torch.device], BatchAssignment] = {}
        self._oversized = 0  # divisions in a row that used less than half of the slots
        self._tables: list[weakref.ref[Tables]] = []
        self.copies: dict[object, Tables] = {}  # of mixes on all layers, made together, by kernel (core/batched/mix_copies)

    def __deepcopy__(self, memo: dict[int, object]) -> Selection:
        """For copies of the layers: the same adapters are active; what layers derive from them is derived anew."""
        found = Selection()
        found.active, found.shares, found.units = self.active, self.shares, self.units
        found.changes, found.attached_at = self.changes, dict(self.attached_at)
        found._numbers = itertools.count(self.changes + 1)
        return found

    def use(self, name: str | None) -> None:
        """Everything uses the adapter `name`, or the bare base. The name is not checked here; see models/inject.activate."""
        self.active, self.shares, self._runs = name, None, None
        self._assignments = {}

    def divide(self, shares: Iterable[Share], *, units: int) -> None:
        """The next batches have `units` units, and each share of them its adapter; units in no share use the bare base.

        Pairs are not to be written to while the same shares are computed. Raises ValueError for a share that does not lie within
        the batch.
        """
        given = tuple(shares)
        for share in given:
            if not 0 <= share.start < share.stop <= units:
                raise ValueError(f"{share} does not lie within a batch of {units}")
        if given == self.shares and units == self.units:
            return  # the same rows generate another token: everything derived still holds
        self.shares, self.units = given, units
        self._runs = None
        self._assignments = {}

    def changed(self, name: str, *, gone: bool = False) -> None:
        """Records that the adapter `name` was attached or detached, or removed from all layers (`gone`): copies of its pairs are
        stale.

        From any thread, after the layers have changed; rows that are being computed do not use this adapter.
        """
        number = next(self._numbers)
        if gone:
            self.attached_at.pop(name, None)
        else:
            self.attached_at[name] = number
        self.changes = number

    def register(self, tables: Tables) -> None:
        """Registers copies that layers use for divided batches, for as long as they are alive."""
        self._tables = [known for known in self._tables if known() is not None] + [weakref.ref(tables)]

    @property
    def table_bytes(self) -> int:
        """Bytes of all copies of pairs for divided batches. From any thread."""
        return sum(tables.bytes for known in self._tables if (tables := known()) is not None)

    def release(self) -> None:
        """Frees those copies; the next divided batch makes its own. Call it in the thread that runs the model."""
        for known in self._tables:
            if (tables := known()) is not None:
                tables.release()
        self.changes = next(self._numbers)  # layers check their copies again

    def states(self, to: BatchAssignment) -> dict[int, MixState]:
        """The state that each slot in use must have now."""
        changes = self.changes
        known = cast("tuple[int, dict[int, MixState]] | None", to.picked.get(_STATES))
        if known is not None and known[0] == changes:
            return known[1]
        mixes = {place: to.places[place] for place in to.used}
        found = {place: (mix, tuple(self.attached_at.get(name) for name, _ in mix)) for place, mix in mixes.items()}
        to.picked[_STATES] = changes, found  # replaces the last one: the same rows may outlive thousands of changes
        return found

    def shares_over(self, tokens: int) -> tuple[Share, ...]:
        """The shares in tokens, for a layer with `tokens` of them: equally many for each unit."""
        shares, each = self.shares or (), self._each(tokens)
        if each == 1:
            return shares
        return tuple(Share(share.start * each, share.stop * each, share.name, share.weight) for share in shares)

    def all_shares(self, tokens: int) -> tuple[Share, ...]:
        """The shares of a divided batch; else one share of all tokens, if an adapter is active."""
        if self.shares is not None:
            return self.shares_over(tokens)
        return () if self.active is None else _whole(tokens, self.active)

    def assignment(self, tokens: int, device: torch.device) -> BatchAssignment:
        """How layers with `tokens` tokens compute the divided batch; computed once for all of them.

        A mix keeps its slot from one batch to the next, so that its pairs need not be copied again. The tuple of slots is the
        same object as long as all mixes had one.
        """
        found = self._assignments.get((tokens, device))
        if found is None:
            each = self._each(tokens)
            if self._runs is None:
                self._runs = _runs(self.shares or ())
                mixes = dict.fromkeys(mix for _, _, mix in self._runs)
                self._oversized = self._oversized + 1 if len(self._places) > 2 * len(mixes) else 0
                self._places = tuple(mixes) if self._oversized >= PATIENCE else _placed(self._places, mixes)
            spans = [(slice(start * each, stop * each), mix) for start, stop, mix in self._runs]
            found = self._assignments[tokens, device] = _assignment(spans, self._places, tokens, device)
        return found

    def _each(self, tokens: int) -> int:
        each, rest = divmod(tokens, self.units)
        if rest:
            raise ValueError(f"a layer sees {tokens} tokens, which is no multiple of the batch's {self.units} units")
        return each


@lru_cache(maxsize=8)
def _whole(tokens: int, name: str) -> tuple[Share, ...]:
    """The one share of a batch that is not divided; the same one for all layers."""
    return (Share(0, tokens, name),)


def _runs(shares: tuple[Share, ...]) -> tuple[Run, ...]:
    """Units by their mix, neighbours with one mix together. Weights of overlapping shares of one adapter are added."""
    ends = sorted({end for share in shares for end in (share.start, share.stop)})
    found: list[Run] = []
    for start, stop in itertools.pairwise(ends):
        weights: dict[str, float] = {}
        for share in shares:
            if share.start <= start < share.stop:
                weights[share.name] = weights.get(share.name, 0.0) + share.weight
        if not weights:
            continue
        mix = tuple(sorted(weights.items()))
        if found and found[-1][1:] == (start, mix):
            found[-1] = found[-1][0], stop, mix
        else:
            found.append((start, stop, mix))
    return tuple(found)


def _placed(places: tuple[Mix, ...], mixes: Collection[Mix]) -> tuple[Mix, ...]:
    """`places` with a slot for each of the `mixes`: the one it has, else an unused one, else a new one."""
    new = [mix for mix in mixes if mix not in places]
    if not new:
        return places
    held = list(places)
    free = [place for place, mix in enumerate(held) if mix not in mixes]
    for mix, place in itertools.zip_longest(new, free[: len(new)]):
        if place is None:
            held.append(mix)
        else:
            held[place] = mix
    return tuple(held)


def _assignment(
    spans: Sequence[tuple[slice, Mix]], places: tuple[Mix, ...], tokens: int, device: torch.device
) -> BatchAssignment:
    place_of = {mix: place for place, mix in enumerate(places)}
    own: dict[int, list[slice]] = {}
    for span, mix in spans:
        own.setdefault(place_of[mix], []).append(span)
    long: list[tuple[Sequence[int], int]] = []
    at: list[tuple[int, int]] = []
    for place, parts in own.items():
        numbers = [token for part in parts for token in range(part.start, part.stop)]
        if len(numbers) <= FEW:
            at += [(token, place) for token in numbers]
        else:
            long.append((numbers if len(parts) > 1 else range(parts[0].start, parts[0].stop), place))
    at.sort()
    some = None if len(at) == tokens else torch.tensor([token for token, _ in at], dtype=torch.int64).to(device)
    return BatchAssignment(places, frozenset(own), tuple(long), tuple(at), some)
