"""Which adapter counts: one Selection for all adapted layers of a model, so that switching is one assignment."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Mix = tuple[tuple[str, float], ...]  # the adapters that a token uses, with weights; () for the bare base
LONG = 16  # neighbouring tokens of one mix beyond which they are multiplied by themselves
FEW = 2  # runs of neighbours up to which all are


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
    """A divided batch as layers compute it: each mix of adapters has a place, and each place sees some of the tokens.

    `places` are the mixes by place, () where one is free. `long` are neighbouring tokens of one mix, with its place. All other
    tokens with a mix are computed together, `turns` of them by each place: place p sees the tokens `seen[p·turns …]`, and
    what becomes of `tokens` (k,) is found at `found` (k,) among those. `aligned`: token i sees place i, and that is all.
    """

    places: tuple[Mix, ...]
    long: tuple[tuple[slice, int], ...]
    turns: int
    seen: Tensor
    tokens: Tensor
    found: Tensor
    aligned: bool


class Selection:
    """The adapter that all units use (`active`), or the `shares` of a batch of `units` whose units use different ones."""

    def __init__(self) -> None:
        self.active: str | None = None
        self.shares: tuple[Share, ...] | None = None
        self.units = 0
        self._places: tuple[Mix, ...] = ()
        self._runs: tuple[tuple[int, int, Mix], ...] = ()  # (start, stop, mix) of neighbouring units
        self._arranged: dict[tuple[int, torch.device], Arrangement] = {}

    def use(self, name: str | None) -> None:
        """Everything uses the adapter `name`, or the bare base. The name is not checked here; see models/inject.activate."""
        self.active, self.shares = name, None
        self._arranged.clear()

    def divide(self, shares: Iterable[Share], *, units: int) -> None:
        """The next batches have `units` units, and each share of them its adapter; units in no share use the bare base.

        Raises ValueError for a share that does not lie within the batch.
        """
        given = tuple(shares)
        for share in given:
            if not 0 <= share.start < share.stop <= units:
                raise ValueError(f"{share} does not lie within a batch of {units}")
        if given == self.shares and units == self.units:
            return  # the same rows write another token: what was worked out for them still holds
        self.shares, self.units = given, units
        self._runs = _runs(given)
        self._places = _placed(self._places, [mix for _, _, mix in self._runs])
        self._arranged.clear()

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
            runs = [(start * each, stop * each, mix) for start, stop, mix in self._runs]
            found = self._arranged[tokens, device] = _arrangement(runs, self._places, tokens, device)
        return found

    def _each(self, tokens: int) -> int:
        each, rest = divmod(tokens, self.units)
        if rest:
            raise ValueError(f"a layer sees {tokens} tokens, which is no multiple of the batch's {self.units} units")
        return each


def _runs(shares: tuple[Share, ...]) -> tuple[tuple[int, int, Mix], ...]:
    """Where neighbouring units use one mix. The weights of shares of one adapter that overlap add up."""
    ends = sorted({end for share in shares for end in (share.start, share.stop)})
    found: list[tuple[int, int, Mix]] = []
    for start, stop in itertools.pairwise(ends):
        weights: dict[str, float] = {}
        for share in shares:
            if share.start <= start < share.stop:
                weights[share.name] = weights.get(share.name, 0.0) + share.weight
        mix = tuple(sorted(weights.items()))
        if found and mix and found[-1][1:] == (start, mix):
            found[-1] = found[-1][0], stop, mix
        elif mix:
            found.append((start, stop, mix))
    return tuple(found)


def _placed(places: tuple[Mix, ...], mixes: Iterable[Mix]) -> tuple[Mix, ...]:
    """`places` with the `mixes` in them: known ones stay, new ones take the places of those that are gone, or follow.

    All anew, and the others forgotten, where more than half of the places would see nothing.
    """
    wanted = dict.fromkeys(mixes)
    if len(places) > 2 * len(wanted):
        return tuple(wanted)
    found, held = list(places), set(places)
    free = (place for place, mix in enumerate(places) if mix not in wanted)
    for mix in wanted:
        if mix in held:
            continue
        place = next(free, len(found))
        found[place : place + 1] = [mix]
    return tuple(found)


def _arrangement(
    runs: Iterable[tuple[int, int, Mix]], places: tuple[Mix, ...], tokens: int, device: torch.device
) -> Arrangement:
    place_of = {mix: place for place, mix in enumerate(places)}
    runs = list(runs)
    most = LONG if len(runs) > FEW else 0
    long: list[tuple[slice, int]] = []
    mine: list[list[int]] = [[] for _ in places]  # the tokens of each place that are computed together
    for start, stop, mix in runs:
        if stop - start > most:
            long.append((slice(start, stop), place_of[mix]))
        else:
            mine[place_of[mix]] += range(start, stop)
    turns = max(map(len, mine), default=0)
    aligned = not long and len(places) == tokens and all(own == [token] for token, own in enumerate(mine))
    seen = [token for own in mine for token in [*own, *[0] * (turns - len(own))]]
    where = [(token, place * turns + turn) for place, own in enumerate(mine) for turn, token in enumerate(own)]
    lists = seen, [token for token, _ in where], [place for _, place in where]
    at, own, found = (torch.tensor(numbers, dtype=torch.int64).to(device) for numbers in lists)
    return Arrangement(places, tuple(long), turns, at, own, found, aligned)
