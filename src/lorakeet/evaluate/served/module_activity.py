"""Which adapted modules are active in a served model, from log-probabilities that it reports and the live model's own.

    reported − live  =  what is left out there  +  rounding

The live model says what leaving out each module's pair would change (its effect). How much of an effect is in the difference is a
weighted least-squares share: 0 if the module is active, 1 if it is missing. Its spread is that of the server's own remaining
differences (White 1980), summed by place, since tokens of one place are not independent, and widened by how much more they vary
by row. So it needs no knowledge of the server's number format, and a server that differs in other ways has a wide spread.

Weights are 1 / (mean square of all effects on a value): places that amplify a change amplify rounding as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import special

from lorakeet.evaluate.intervals import Floats

FALSE_MISSING = 1e-3  # of a certificate: a right server is said to lack a module
FALSE_ACTIVE = 1e-3  # of a module
FEWEST_PLACES = 12
_LEAST_WEIGHT = 0.05  # of the mean square effect: it bounds the weights
_HALF = 0.5  # of an effect: less is active, more is missing
_MOST_FAULTS = 12
_UNKNOWN_ROWS = 2.0  # widening of the variance, where there are too few rows to measure it
_FEWEST_ROWS = 4

Modules = frozenset[str]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EffectShare:
    """The share of an effect that is in the difference, and its standard deviation."""

    value: float
    spread: float


@dataclass(frozen=True, eq=False)
class EffectValues:
    """Differences reported − live (values,), with the place and the row of each, and the effects that all are weighted by."""

    apart: Floats
    places: Integers
    rows: Integers
    weights: Floats

    @classmethod
    def of(cls, apart: Floats, places: Integers, rows: Integers, effects: Floats) -> EffectValues:
        """`effects` (modules, values) of leaving out each module."""
        square = np.mean(effects**2, axis=0)
        return cls(apart, places, rows, 1 / (square + _LEAST_WEIGHT * max(float(square.mean()), 1e-30)))

    def without(self, effect: Floats) -> EffectValues:
        """The same once `effect` is taken off."""
        return replace(self, apart=self.apart - effect)

    @property
    def size(self) -> float:
        """The weighted sum of squares."""
        return float((self.weights * self.apart**2).sum())

    def share(self, effect: Floats, widening: float = 1.0) -> EffectShare:
        """How much of `effect` is in the difference; `widening` multiplies its variance."""
        information = float((self.weights * effect**2).sum())
        if information <= 0:
            return EffectShare(0.0, math.inf)
        value = float((self.weights * effect * self.apart).sum()) / information
        variance = self._variance(effect, value, self.places) * max(widening, 1.0)
        return EffectShare(value, math.sqrt(variance) / information)

    def widening(self, effects: Floats) -> float:
        """How much larger the variance of a share is by rows than by places, at least 1: places of a row are not independent."""
        if len(np.unique(self.rows)) < _FEWEST_ROWS:
            return _UNKNOWN_ROWS
        ratios = []
        for effect in effects:
            value = self.share(effect).value
            by_place = self._variance(effect, value, self.places)
            if by_place > 0:
                ratios.append(self._variance(effect, value, self.rows) / by_place)
        return max(1.0, float(np.mean(ratios))) if ratios else 1.0

    def _variance(self, effect: Floats, share: float, groups: Integers) -> float:
        """Of the sum of weight · effect · difference: the squares of its parts by group."""
        parts = np.bincount(groups, self.weights * effect * (self.apart - share * effect))
        count = len(np.unique(groups))
        return float((parts**2).sum()) * count / max(count - 1, 1)


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


@dataclass(frozen=True)
class LeftOut:
    """What the live model says: the effects of leaving out single modules, sets of them, and of a scale of 0 in first order."""

    singles: Mapping[str, Floats]
    scale: Floats
    sets: Sequence[Modules]  # that are likely to be missing together
    together: Callable[[Modules], Floats]  # their effect; called only if a module is not shown active

    @property
    def table(self) -> Floats:
        """(modules, values)."""
        return np.stack(list(self.singles.values()))


def find_activity(values: EffectValues, known: LeftOut) -> ActivityFound:
    """What `values` show of each module. ValueError for fewer than FEWEST_PLACES places."""
    places = len(np.unique(values.places))
    if places < FEWEST_PLACES:
        raise ValueError(f"modules need {FEWEST_PLACES} places; given are {places}")
    degrees = max(places // 2, 4)
    tests = len(known.singles) + 1
    beyond = float(special.stdtrit(degrees, 1 - FALSE_MISSING / tests / 2))
    within = float(special.stdtrit(degrees, 1 - FALSE_ACTIVE))
    search = _FaultSearch(values, known, beyond, within)
    search.run()
    rest, widening = search.rest, search.widening
    scale = rest.share(known.scale, widening)
    certain, either = search.certain, tuple(tuple(sets) for sets in search.either)
    doubtful = frozenset().union(*(one for sets in either for one in sets)) - certain
    active: list[str] = []
    unclear: dict[str, str] = {}
    if abs(scale.value) > beyond * scale.spread:
        rest = rest.without(scale.value * known.scale)
    for name, effect in known.singles.items():
        if name in certain:
            continue
        if name in doubtful:
            unclear[name] = "it is one of several of which one is missing"
            continue
        found = rest.share(effect, widening)
        if search.shown_active(found):
            active.append(name)
        elif found.spread * within >= 1:
            unclear[name] = "leaving it out changes these log-probabilities no more than the server's rounding does"
        else:
            unclear[name] = f"the server shows {1 - found.value:.2g} of it, ± {found.spread:.2g}"
    missing = tuple(name for name in known.singles if name in certain)
    return ActivityFound(tuple(active), missing, unclear, either, 1 - scale.value, scale.spread, beyond)


@dataclass
class _FaultSearch:
    """Takes off one fault after another, as long as one explains the difference significantly."""

    values: EffectValues
    known: LeftOut
    beyond: float
    within: float

    def run(self) -> None:
        self.rest, self.widening = self.values, self.values.widening(self.known.table)
        self.either: list[list[Modules]] = []
        self.certain: Modules = frozenset()
        singles = {frozenset([name]): effect for name, effect in self.known.singles.items()}
        if all(self.shown_active(self.rest.share(effect, self.widening)) for effect in singles.values()):
            return
        candidates = {**singles, **{modules: self.known.together(modules) for modules in self.known.sets}}
        gone: Modules = frozenset()
        for _ in range(_MOST_FAULTS):
            open_ones = {modules: effect for modules, effect in candidates.items() if not modules & gone}
            best = self._best(open_ones)
            if best is None:
                return
            alike = [best, *self._alike(open_ones, best)]
            sure = frozenset.intersection(*alike)
            self.certain |= sure
            if not sure:
                self.either.append(alike)
            gone |= best
            self.rest = self.values.without(self.known.together(gone))
            self.widening = self.rest.widening(self.known.table)

    def shown_active(self, found: EffectShare) -> bool:
        """Whether less than half of an effect is missing, and the whole of it is excluded."""
        return found.value < _HALF and 1 - found.value > self.within * found.spread

    def _best(self, candidates: Mapping[Modules, Floats]) -> Modules | None:
        """The fault that leaves the least of the difference, if it is no chance, and a wrong scale does not leave less."""
        left = {modules: self.rest.without(effect).size for modules, effect in candidates.items()}
        best = min(left, key=lambda modules: left[modules], default=None)
        if best is None:
            return None
        scale = self.rest.share(self.known.scale)
        if self.rest.without(scale.value * self.known.scale).size < left[best] < self.rest.size:
            return None
        effect = candidates[best]
        after = self.rest.without(effect)
        self.widening = after.widening(self.known.table)
        found = self.rest.share(effect, self.widening)
        shown = found.value >= _HALF and found.value > self.beyond * found.spread
        return best if shown and left[best] < self.rest.size else None

    def _alike(self, candidates: Mapping[Modules, Floats], best: Modules) -> Iterable[Modules]:
        """Other faults that explain the difference as well: a change from `best` to them is not excluded."""
        after = self.rest.without(candidates[best])
        for modules, effect in candidates.items():
            found = after.share(effect - candidates[best], self.widening)
            if modules != best and not self.shown_active(found):
                yield modules
