"""Which adapted modules are active in a served model, from log-probabilities that it reports and the live model's own.

    reported − live  =  what is left out there  +  rounding

The live model says what leaving out each module's pair would change (its effect). How much of an effect is in the difference is a
weighted least-squares share: 0 if the module is active, 1 if it is missing. Its spread is the jackknife's over rows (each row is
left out once), with one degree of freedom less than there are rows: what rounding does at two places of a row is not independent.
So no number format has to be known, and a server that differs in other ways has a wide spread. Rounding to few bits changes the
weights once, for all rows alike, which rows do not show. Where the live model was computed in the server's format, in several
ways, what an effect's shares in these computations have in common over the rows is added to the spread.

Shares are of one effect alone. Where more than rounding is left, in a sum of effects, modules are called active by their shares
of all effects at once, each beside all others.

Weights are 1 / (mean square of all effects on a value): places that amplify a change amplify rounding as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import special

from lorakeet.evaluate.intervals import Floats

FALSE_MISSING = 1e-3  # of a certificate: a right server is said to lack a module, or to have a wrong scale
FALSE_ACTIVE = 1e-3  # of a module
FEWEST_PLACES = 12
FEWEST_ROWS = 4
_LEAST_WEIGHT = 0.05  # of the mean square effect: it bounds the weights
_HALF = 0.5  # of an effect: less is active, more is missing
_LEAST_KNOWN = 0.05  # of an effect's square, of which a computation says what rounding does
_MOST_FAULTS = 12
_NOTABLE = 0.02  # of a sum of effects: more than that may hide a missing module
_CHANCE = 0.01  # that a right server shows as much of such a sum
_OWN = 1e-3  # of an effect's square, which no other effects explain: with less its share beside them is unknown

Modules = frozenset[str]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EffectShare:
    """The share of an effect that is in the difference, and its standard deviation."""

    value: float
    spread: float


@dataclass(frozen=True, eq=False)
class EffectValues:
    """Differences reported − live (values,), with the place and the row of each, and the weights.

    `computed` are the same differences of right computations in the server's format, NaN where they are unknown.
    """

    apart: Floats
    places: Integers
    rows: Integers  # numbered from 0, without gaps
    weights: Floats
    computed: tuple[Floats, ...] = ()

    @classmethod
    def of(cls, apart: Floats, places: Integers, rows: Integers, effects: Floats) -> EffectValues:
        """`effects` (modules, values) of leaving out each module."""
        square = np.mean(effects**2, axis=0)
        numbers = np.unique(rows, return_inverse=True)[1].reshape(-1)
        return cls(apart, places, numbers, 1 / (square + _LEAST_WEIGHT * max(float(square.mean()), 1e-30)))

    @property
    def count(self) -> int:
        """How many rows there are."""
        return int(self.rows.max(initial=-1)) + 1

    def without(self, effect: Floats) -> EffectValues:
        """The same once `effect` is taken off."""
        return replace(self, apart=self.apart - effect)

    @property
    def size(self) -> float:
        """The weighted sum of squares."""
        return float((self.weights * self.apart**2).sum())

    def quantile(self, chance: float) -> float:
        """Of the spread, beyond which a share is by `chance`."""
        return float(special.stdtrit(self.count - 1, 1 - chance))

    def share(self, effect: Floats) -> EffectShare:
        """How much of `effect` is in the difference; unknown where a single row has all of the effect."""
        information = np.bincount(self.rows, self.weights * effect**2)
        found = np.bincount(self.rows, self.weights * effect * self.apart)
        rest = information.sum() - information
        if rest.min() <= 1e-9 * information.sum():
            return EffectShare(0.0, math.inf)
        value = float(found.sum() / information.sum())
        spread = float(self._jackknife((found.sum() - found) / rest, value))
        return EffectShare(value, math.hypot(spread, self._rounding(effect[None], lambda one, some: [one.share(some[0])])[0]))

    @cached_property
    def _computations(self) -> list[tuple[EffectValues, npt.NDArray[np.bool_]]]:
        """Each of `computed` as differences of its own, and what it knows; without those of less than FEWEST_ROWS rows."""
        found = []
        for apart in self.computed:
            here = np.isfinite(apart)
            rows = np.unique(self.rows[here], return_inverse=True)[1].reshape(-1)
            one = EffectValues(apart[here], self.places[here], rows, self.weights[here])
            if one.count >= FEWEST_ROWS:
                found.append((one, here))
        return found

    def _rounding(self, effects: Floats, shares: Callable[[EffectValues, Floats], Sequence[EffectShare]]) -> Floats:
        """How far rounding moves the share of each of `effects` (modules, values) on all rows alike; 0 without `computed`.

        The root mean square of the shares in the computations, without what differs from row to row. A computation counts for an
        effect of which it knows _LEAST_KNOWN.
        """
        total, count = np.zeros(len(effects)), np.zeros(len(effects))
        whole = (self.weights * effects**2).sum(1)
        for one, here in self._computations:
            known = (one.weights * effects[:, here] ** 2).sum(1) >= _LEAST_KNOWN * np.maximum(whole, 1e-30)
            for number, found in enumerate(shares(one, effects[:, here])):
                if known[number] and math.isfinite(found.spread):
                    total[number] += found.value**2 - found.spread**2
                    count[number] += 1
        return np.asarray(np.sqrt(np.maximum(total, 0.0) / np.maximum(count, 1)))

    def shares_beside(self, effects: Floats) -> list[EffectShare]:
        """How much of each of `effects` (modules, values) is in the difference, if all may be; unknown where others equal it."""
        heavy = effects * self.weights
        size = np.sqrt(np.maximum((heavy * effects).sum(1), 1e-30))
        effects, heavy = effects / size[:, None], heavy / size[:, None]
        squares, found = heavy @ effects.T + 1e-9 * np.eye(len(size)), heavy @ self.apart
        inverse = np.linalg.inv(squares)
        values, others = inverse @ found, []
        for row in range(self.count):
            here = self.rows == row
            part = heavy[:, here]
            others.append(np.linalg.solve(squares - part @ effects[:, here].T, found - part @ self.apart[here]))
        by_row = np.where(np.diagonal(inverse) * _OWN < 1, self._jackknife(np.stack(others), values), math.inf)
        spreads = np.hypot(by_row / size, self._rounding(effects * size[:, None], EffectValues.shares_beside))
        return [EffectShare(float(one), float(spread)) for one, spread in zip(values / size, spreads, strict=True)]

    def _jackknife(self, others: Floats, value: float | Floats) -> Floats:
        """The standard deviation of `value`, from what it is without each row (rows, …)."""
        return np.asarray(np.sqrt((self.count - 1) / self.count * ((others - value) ** 2).sum(0)), np.float64)


@dataclass(frozen=True)
class ActivityFound:
    """Modules by what was shown of them; `unclear` with the reason. `scale` is what the server applies of the adapter's scale."""

    active: tuple[str, ...]
    missing: tuple[str, ...]
    unclear: dict[str, str]
    either: tuple[tuple[Modules, ...], ...] = ()  # one of these sets is missing, and which one is not distinguished
    scale: float = 1.0
    scale_spread: float = math.inf
    quantile: float = 0.0  # of the spread, beyond which a share is no chance

    @property
    def faults(self) -> int:
        """How many modules are missing at least."""
        return len(self.missing) + sum(min(map(len, sets)) for sets in self.either)

    def scale_limit(self, allowed: float) -> float:
        """The largest |scale − 1| of a server whose number format may change the scale by `allowed` of itself."""
        return allowed + self.quantile * self.scale_spread


@dataclass(frozen=True)
class LeftOut:
    """What the live model says: the effects of leaving out single modules, sets of them, and of a scale of 0 in first order."""

    singles: Mapping[str, Floats]
    scale: Floats
    sets: Sequence[Modules]  # that are likely to be missing together
    together: Callable[[Modules], Floats]  # their effect; called only if a module is not shown active

    def table(self, names: Iterable[str] | None = None) -> Floats:
        """(modules, values), of all or of `names`."""
        return np.stack([self.singles[name] for name in (self.singles if names is None else names)])


def find_activity(values: EffectValues, known: LeftOut, chance: float = FALSE_MISSING) -> ActivityFound:
    """What `values` show of each module; a right server is said to lack one by `chance`.

    ValueError for fewer than FEWEST_PLACES places, or FEWEST_ROWS rows.
    """
    places = len(np.unique(values.places))
    if places < FEWEST_PLACES or values.count < FEWEST_ROWS:
        raise ValueError(f"modules need {FEWEST_PLACES} places of {FEWEST_ROWS} rows; given are {places} of {values.count}")
    tests = len(known.singles) + 1
    search = _FaultSearch(values, known, values.quantile(chance / tests / 2), values.quantile(FALSE_ACTIVE))
    search.run()
    beside = search.settle()
    rest, certain, either = search.rest, search.certain, tuple(tuple(sets) for sets in search.either)
    doubtful = frozenset().union(*(one for sets in either for one in sets)) - certain
    active: list[str] = []
    unclear: dict[str, str] = {}
    for name, effect in known.singles.items():
        if name in certain:
            continue
        if name in doubtful:
            unclear[name] = "it is one of several of which one is missing"
            continue
        found = rest.share(effect)
        if search.shown_active(found) and (not beside or search.shown_active(beside[name])):
            active.append(name)
        elif beside:
            unclear[name] = "the server differs by more than single modules explain"
        elif found.spread * search.within >= 1:
            unclear[name] = "leaving it out changes these log-probabilities no more than the server's rounding does"
        else:
            unclear[name] = f"the server shows {1 - found.value:.2g} of it, ± {found.spread:.2g}"
    missing = tuple(name for name in known.singles if name in certain)
    scale = replace(rest, computed=()).share(known.scale)  # whose limit has what the format may do
    once = values.quantile(FALSE_MISSING / tests / 2)
    return ActivityFound(tuple(active), missing, unclear, either, 1 - scale.value, scale.spread, once)


@dataclass
class _FaultSearch:
    """Takes off one fault after another, as long as one explains the difference significantly."""

    values: EffectValues
    known: LeftOut
    beyond: float
    within: float

    def run(self) -> None:
        self.rest = self.values
        self.either: list[list[Modules]] = []
        self.certain: Modules = frozenset()
        self.gone: Modules = frozenset()  # what is taken off in `rest`
        self.picks = 0
        singles = {frozenset([name]): effect for name, effect in self.known.singles.items()}
        if all(self.shown_active(self.rest.share(effect)) for effect in singles.values()) and not self.more_is_left():
            return
        candidates = {**singles, **{modules: self.known.together(modules) for modules in self.known.sets}}
        gone: Modules = frozenset()
        for _ in range(_MOST_FAULTS):
            open_ones = {modules: effect for modules, effect in candidates.items() if not modules & gone}
            best = self._best(open_ones)
            if best is None:
                break
            self.picks += 1
            alike = [best, *self._alike(open_ones, best)]
            there = self._there(best, candidates[best])
            sure = frozenset.intersection(*alike) - there
            self.certain |= sure
            if not sure:
                self.either.append(alike)
            gone |= best - there
            self.rest = self.values.without(self.known.together(gone))
        self.gone = gone
        if not self.either and self.more_is_left():
            self._take_off_together()

    def settle(self) -> dict[str, EffectShare]:
        """What is missing of each module beside all others, where one effect alone may mislead: after faults, or if more is left.

        A module that was taken off, and whose lack is not shown so, is one of several of which one is missing.
        """
        if self.picks < 2 and not self.more_is_left():
            return {}
        shares = zip(self.known.singles, self.rest.shares_beside(self.known.table()), strict=True)
        beside = {name: replace(found, value=found.value + (name in self.gone)) for name, found in shares}
        unsure = {name for name in self.certain if not self.shown_active(replace(beside[name], value=1 - beside[name].value))}
        open_ones = [name for name in beside if name not in self.certain - unsure and not self.shown_active(beside[name])]
        self.either += [[frozenset([name]), *(frozenset([one]) for one in open_ones if one != name)] for name in sorted(unsure)]
        self.certain -= unsure
        return beside

    def shown_active(self, found: EffectShare) -> bool:
        """Whether less than half of an effect is missing, and the whole of it is excluded."""
        return found.value < _HALF and 1 - found.value > self.within * found.spread

    def more_is_left(self) -> bool:
        """Whether the rest has more of a sum of effects, of all modules or of a set, than rounding explains."""
        sums = [self.known.scale, *(np.sum([self.known.singles[name] for name in modules], 0) for modules in self.known.sets)]
        beyond = self.rest.quantile(_CHANCE / len(sums) / 2)
        return any(abs(found.value) > max(_NOTABLE, beyond * found.spread) for found in map(self.rest.share, sums))

    def _take_off_together(self) -> None:
        """Takes off all modules whose whole effect is there beside the others, if that leaves less than a wrong scale does."""
        shares = zip(self.known.singles, self.rest.shares_beside(self.known.table()), strict=True)
        more = {name for name, found in shares if found.value - _HALF > self.within * found.spread} - self.gone
        if not more:
            return
        rest = self.values.without(self.known.together(self.gone | more))
        scale = self.rest.share(self.known.scale)
        if rest.size < self.rest.without(scale.value * self.known.scale).size:
            self.certain, self.gone, self.rest, self.picks = self.certain | more, self.gone | more, rest, self.picks + len(more)

    def _best(self, candidates: Mapping[Modules, Floats]) -> Modules | None:
        """The fault that leaves the least of the difference, if it is no chance, and a wrong scale does not leave less."""
        left = {modules: self.rest.without(effect).size for modules, effect in candidates.items()}
        best = min(left, key=lambda modules: left[modules], default=None)
        if best is None:
            return None
        scale = self.rest.share(self.known.scale)
        if self.rest.without(scale.value * self.known.scale).size < left[best] < self.rest.size:
            return None
        found = self.rest.share(candidates[best])
        shown = found.value >= _HALF and found.value > self.beyond * found.spread
        return best if shown and left[best] < self.rest.size else None

    def _there(self, modules: Modules, effect: Floats) -> Modules:
        """Modules of a set that is missing by and large which are shown active beside all others."""
        if len(modules) == 1:  # its share alone says as much
            return frozenset()
        shares = zip(self.known.singles, self.rest.without(effect).shares_beside(self.known.table()), strict=True)
        whole = {name: replace(found, value=found.value + 1) for name, found in shares if name in modules}
        return frozenset(name for name, found in whole.items() if self.shown_active(found))

    def _alike(self, candidates: Mapping[Modules, Floats], best: Modules) -> Iterable[Modules]:
        """Other faults that explain the difference as well: a change from `best` to them is not excluded."""
        after = self.rest.without(candidates[best])
        for modules, effect in candidates.items():
            if modules != best and not self.shown_active(after.share(effect - candidates[best])):
                yield modules
