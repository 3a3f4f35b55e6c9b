"""Which adapter counts: one Selection for all adapted layers of a model, so that switching is one assignment."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Mix = tuple[tuple[str, float], ...]  # the adapters that a token uses, with weights
Run = tuple[int, int, Mix]  # the units start … stop − 1 use one mix
FEW = 2  # runs of neighbours that use one mix, up to which each is multiplied by itself
COPIES = 3  # of the pairs of a mix, on average, up to which each run has one of its own


@dataclass(frozen=True)
class Share:
    """The units start … stop − 1 of a batch use `name` with `weight`; weight 1 is the adapter as it is.

    A unit is a token of rows laid end to end, or a row or picture of a padded batch.
    """

    start: int
    stop: int
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Arrangement:
    """A divided batch as layers compute it: each share has a place where the pairs of its mix stand.

    `places` are the mixes by place, some of which nobody may use now; `used` are the others. `long` are tokens that use one mix,
    as a slice or by number, with its place, multiplied by themselves. All other tokens with a mix are multiplied together, one by
    each place: place p sees the token `seen[p]`, and what becomes of `tokens` (k,) is found at the places `at` (k,). `aligned`:
    place i sees token i, and all do.
    """

    places: tuple[Mix, ...]
    used: frozenset[int]
    long: tuple[tuple[slice | Tensor, int], ...]
    seen: Tensor
    tokens: Tensor
    at: Tensor
    aligned: bool


class Selection:
    """The adapter that all units use (`active`), or the `shares` of a batch of `units` whose units use different ones."""

    def __init__(self) -> None:
        self.active: str | None = None
        self.shares: tuple[Share, ...] | None = None
        self.units = 0
        self.changes = 0  # how often adapters have come or gone
        self._places: tuple[Mix, ...] = ()
        self._runs: tuple[Run, ...] | None = None  # of the shares; worked out when a layer asks for them
        self._at: tuple[int, ...] = ()  # the place of each run
        self._arranged: dict[tuple[int, torch.device], Arrangement] = {}

    def use(self, name: str | None) -> None:
        """Everything uses the adapter `name`, or the bare base. The name is not checked here; see models/inject.activate."""
        self.active, self.shares, self._runs = name, None, None
        self._arranged = {}

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
            return  # the same rows write another token: what was worked out for them still holds
        self.shares, self.units = given, units
        self._runs = None
        self._arranged = {}

    def changed(self) -> None:
        """An adapter has come to a layer or left it: what stands at the places is looked at again."""
        self.changes += 1
        self._arranged = {}

    def shares_over(self, tokens: int) -> tuple[Share, ...]:
        """The shares in tokens, where a layer sees `tokens` of them: as many for each unit."""
        shares, each = self.shares or (), self._each(tokens)
        if each == 1:
            return shares
        return tuple(Share(share.start * each, share.stop * each, share.name, share.weight) for share in shares)

    def arranged(self, tokens: int, device: torch.device) -> Arrangement:
        """How layers that see `tokens` tokens compute the divided batch; worked out once for all of them.

        A mix keeps its place from one batch to the next, so that its pairs need not be copied again.
        """
        found = self._arranged.get((tokens, device))
        if found is None:
            each = self._each(tokens)
            if self._runs is None:
                self._runs = _runs(self.shares or ())
                self._places, self._at = _placed(self._places, self._runs)
            spans = [slice(start * each, stop * each) for start, stop, _ in self._runs]
            found = self._arranged[tokens, device] = _arrangement(spans, self._at, self._places, tokens, device)
        return found

    def _each(self, tokens: int) -> int:
        each, rest = divmod(tokens, self.units)
        if rest:
            raise ValueError(f"a layer sees {tokens} tokens, which is no multiple of the batch's {self.units} units")
        return each


def _runs(shares: tuple[Share, ...]) -> tuple[Run, ...]:
    """Units by the mix that they use. The weights of shares of one adapter that overlap add up.

    Neighbours of one mix are joined where few runs are left then.
    """
    ends = sorted({end for share in shares for end in (share.start, share.stop)})
    found: list[Run] = []
    for start, stop in itertools.pairwise(ends):
        weights: dict[str, float] = {}
        for share in shares:
            if share.start <= start < share.stop:
                weights[share.name] = weights.get(share.name, 0.0) + share.weight
        if weights:
            found.append((start, stop, tuple(sorted(weights.items()))))
    joined: list[Run] = []
    for start, stop, mix in found:
        if joined and joined[-1][1:] == (start, mix):
            joined[-1] = joined[-1][0], stop, mix
        else:
            joined.append((start, stop, mix))
    return tuple(joined if len(joined) <= FEW else found)


def _placed(places: tuple[Mix, ...], runs: Sequence[Run]) -> tuple[tuple[Mix, ...], tuple[int, ...]]:
    """`places` with one for each of the `runs`, and which that is: preferably where its mix stands already.

    One for all runs of a mix, where few mixes have many: a copy of its pairs for each would take memory for nothing. New mixes
    come to places that nobody uses, or follow. All anew where more than half of the places would see nothing.
    """
    mixes = [mix for _, _, mix in runs]
    distinct = list(dict.fromkeys(mixes))
    if len(mixes) > COPIES * len(distinct):
        found, at = _placed(places, [(0, 1, mix) for mix in distinct])
        place_of = dict(zip(distinct, at, strict=True))
        return found, tuple(place_of[mix] for mix in mixes)
    if len(places) > 2 * len(mixes):
        return tuple(mixes), tuple(range(len(mixes)))
    held, own = list(places), [-1] * len(mixes)
    free = dict.fromkeys(range(len(places)))
    for number, mix in enumerate(mixes):  # in the same order as before, most stay where they are
        if number < len(places) and places[number] == mix:
            own[number] = number
            del free[number]
    for number, mix in enumerate(mixes):
        if own[number] < 0 and (known := next((place for place in free if places[place] == mix), None)) is not None:
            own[number] = known
            del free[known]
    for number, mix in enumerate(mixes):
        if own[number] < 0:
            own[number] = number if number in free else next(iter(free), len(held))
            free.pop(own[number], None)
            held[own[number] : own[number] + 1] = [mix]
    return tuple(held), tuple(own)


def _arrangement(
    spans: Sequence[slice], at: Sequence[int], places: tuple[Mix, ...], tokens: int, device: torch.device
) -> Arrangement:
    shared = {place for place, count in Counter(at).items() if count > 1}
    long: list[tuple[slice | Tensor, int]] = [
        (span, place)
        for span, place in zip(spans, at, strict=True)
        if place not in shared and span.stop - span.start > 1
    ]
    for place in sorted(shared):
        numbers = [token for span, own in zip(spans, at, strict=True) if own == place for token in range(span.start, span.stop)]
        long.append((_indices(numbers, device), place))
    single = [
        (span.start, place)
        for span, place in zip(spans, at, strict=True)
        if place not in shared and span.stop - span.start == 1
    ]
    token_of = {place: token for token, place in single}
    aligned = len(single) == len(places) == tokens and all(token == place for token, place in single)
    seen = _indices([token_of.get(place, 0) for place in range(len(places))], device)
    own, where = (_indices([part[side] for part in single], device) for side in (0, 1))
    return Arrangement(places, frozenset(at), tuple(long), seen, own, where, aligned)


def _indices(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).to(device)
