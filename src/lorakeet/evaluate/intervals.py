"""Estimates with intervals: closed formulas for shares, draws for everything else.

A statistic is written as a function of *weights*: given weights (draws, n), one row per resample, it returns (draws,)
values. Resampling rows is then drawing counts, resampling groups is drawing counts of groups, the jackknife is a zero
weight, and all draws are computed in a few matrix products. Where the rows are too few for an interval, words say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special  # scipy.stats would take 50 MB more of a training process

from lorakeet.errors import DataError
from lorakeet.evaluate.spec import EvaluateSpec

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Statistic = Callable[[Floats], Floats]  # weights (draws, n) -> values (draws,)

_CELLS = 2_000_000  # weights in memory at once: 16 MB for any n
_JACKKNIFE_BLOCKS = 400  # enough for the acceleration
FEWEST = 10  # independent rows or groups from which the interval of a mean covers (docs/explain/held-out.md)
_ENOUGH = 20  # rows below which tests of means reject a little too often: their level is lowered in proportion (the same)
_WIDEST = 5  # times Student's t: beyond that a few rows decide how wide an interval is
UNBOUNDED, SHARE = (-math.inf, math.inf), (0.0, 1.0)


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, number of rows, method, and seed if the method is random.

    `why_none` are the words in place of an interval that the rows do not give; its ends are then those of all that is possible.
    """

    value: float
    low: float
    high: float
    n: int
    method: str
    confidence: float = 0.95
    seed: int | None = None
    why_none: str = ""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.why_none or f'{self.low:.3f}, {self.high:.3f}'}] n={self.n}"

    def without(self, why: str, bounds: tuple[float, float] = UNBOUNDED) -> Estimate:
        """The value without an interval, and why."""
        return replace(self, low=bounds[0], high=bounds[1], why_none=why)

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing `function` of this value; the interval keeps its coverage."""
        return replace(self, value=function(self.value), low=function(self.low), high=function(self.high))

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def proportion(
    successes: int, n: int, *, confidence: float = 0.95, method: Literal["wilson", "clopper-pearson"] = "wilson"
) -> Estimate:
    """The share successes / n with Wilson's interval, or Clopper and Pearson's (1934; never below its nominal coverage).

    Wilson (1927), p = successes/n, z the normal quantile:  (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"A share needs at least one row: {successes} of {n}; expected 0 <= successes <= n and n >= 1.")
    name, ends = ("Wilson", _wilson) if method == "wilson" else ("Clopper-Pearson", _clopper_pearson)
    low, high = ends(int(successes), int(n), (1 - confidence) / 2)
    low, high = 0.0 if successes == 0 else low, 1.0 if successes == n else high
    return Estimate(successes / n, low, high, int(n), name, confidence)


def _wilson(successes: int, n: int, tail: float) -> tuple[float, float]:
    z, p = -float(special.ndtri(tail)), successes / n
    middle, reach = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - reach) / (1 + z**2 / n), (middle + reach) / (1 + z**2 / n)


def _clopper_pearson(successes: int, n: int, tail: float) -> tuple[float, float]:
    """Quantiles of Beta(k, n − k + 1) and Beta(k + 1, n − k); NaN if k is 0 or n, where `proportion` sets 0 or 1."""
    low = float(special.betaincinv(successes, n - successes + 1, tail))
    return low, float(special.betainccinv(successes + 1, n - successes, tail))


def share_beyond(k: int, n: int, rate: float) -> float:
    """P(X > k) of X, the count among `n` where each counts with the probability `rate` (exact binomial)."""
    return 0.0 if k >= n else float(special.betainc(k + 1, n - k, rate))


def share(flags: NDArray[np.bool_], *, spec: EvaluateSpec, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The share of true flags: Wilson for independent rows, the interval of a mean over groups otherwise."""
    if groups is None:
        return proportion(int(np.sum(flags)), len(flags), confidence=spec.confidence)
    return mean(np.asarray(flags, dtype=np.float64), spec=spec, groups=groups, bounds=SHARE)


def mean(
    values: Floats,
    *,
    spec: EvaluateSpec,
    groups: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
) -> Estimate:
    """The mean of `values` (n,), each within `bounds`, with the interval of `ratio`."""
    return ratio(values, np.ones(len(values)), spec=spec, groups=groups, bounds=bounds)


def ratio(
    numerators: Floats,
    denominators: Floats,
    *,
    spec: EvaluateSpec,
    groups: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
) -> Estimate:
    """sum(numerators) / sum(denominators) over rows, such as nats over tokens, with the interval of `ratio_with_test`."""
    return ratio_with_test(numerators, denominators, spec=spec, groups=groups, bounds=bounds)[0]


def ratio_with_test(
    numerators: Floats,
    denominators: Floats,
    *,
    spec: EvaluateSpec,
    groups: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
) -> tuple[Estimate, float]:
    """The ratio of sums over rows with its interval, and the p-value of 0: all values that one of two tests does not reject.

        bootstrap-t (Efron 1981): (r − v)/s among (r* − r)/s* of resamples, s the standard error of a ratio (skewed rows)
        randomisation (Hartigan 1969): v among the ratios of random halves of the rows (exact if rows scatter symmetrically)

    Each row's ratio is within `bounds`. Below FEWEST rows (or groups) there is no interval, nor where it rests on a few of them.
    Rows that are all equal have the interval of a share that was never seen: 1 − (α/2)^(1/n) of all rows may be at a bound.
    """
    if not len(numerators):
        raise DataError("An interval needs at least one row: 0 rows. Evaluate on a file that has rows.")
    above, below = (np.asarray(each, dtype=np.float64) for each in (numerators, denominators))
    n, (units, index) = len(above), numbered_units(len(above), groups)
    if groups is not None:
        above, below = (np.bincount(index, weights=each).astype(np.float64) for each in (above, below))
    value, unit = float(above.sum() / below.sum()), "rows" if groups is None else "groups"
    over = "" if groups is None else f" over {units} groups"
    found = Estimate(value, value, value, n, f"bootstrap-t and randomisation{over}", spec.confidence, spec.seed)
    residuals = above - value * below
    if np.abs(residuals).max() <= 1e-12 * max(1e-300, np.abs(above).max()):
        return _of_equal(found, units, unit, bounds, over)
    if units < FEWEST:
        return found.without(f"too few {unit} ({units})", bounds), 1.0
    error = math.sqrt(units / (units - 1) * float(residuals @ residuals)) / float(below.sum())
    strictness = min(1.0, units / _ENOUGH)
    found_by = [
        limits(values, against, strictness * (1 - spec.confidence))
        for values, against in (_studentised(above, below, value, error, spec), halves_of(above, below, spec))
    ]
    low, high, p_value = (pick(each) for pick, each in zip((min, max, max), zip(*found_by, strict=True), strict=True))
    if not math.isfinite(high - low):
        return found.without(f"too few {unit} ({units})", bounds), 1.0
    if high - low > _WIDEST * 2 * float(special.stdtrit(units - 1, 0.5 + spec.confidence / 2)) * error:
        decisive = max(1, round(float(np.sum(residuals**2) ** 2 / np.sum(residuals**4))))
        return found.without(f"rests on {decisive} of {units} {unit}", bounds), 1.0
    return replace(found, low=max(low, bounds[0]), high=min(high, bounds[1])), min(1.0, p_value / strictness)


def _of_equal(found: Estimate, units: int, unit: str, bounds: tuple[float, float], over: str) -> tuple[Estimate, float]:
    """The interval of rows that all have one value, and the p-value of 0."""
    value, (least, most) = found.value, bounds
    if value == 0 and least < 0 < most:  # a difference: nothing differs
        return replace(found, why_none=f"equal on all {units} {unit}"), 1.0
    if not math.isfinite(most - least):
        return found.without(f"all {units} {unit} are equal", bounds), 1.0
    unseen = 1 - ((1 - found.confidence) / 2) ** (1 / units)
    found = replace(
        found, low=value - unseen * (value - least), high=value + unseen * (most - value), method=f"unseen share{over}"
    )
    reach = (value / (value - least) if value > 0 else value / (value - most)) if least < 0 < most else 1.0
    return found, min(1.0, 2 * max(0.0, 1 - reach) ** units)


def _studentised(above: Floats, below: Floats, value: float, error: float, spec: EvaluateSpec) -> tuple[Floats, int]:
    """The values (sorted) at which the bootstrap-t changes its mind, and the 1 draw that is the rows themselves."""
    units, found = len(above), []
    for weights in resample_weights(units, spec=spec):
        under = weights @ below
        ratios = (weights @ above) / under
        squares = weights @ above**2 - 2 * ratios * (weights @ (above * below)) + ratios**2 * (weights @ below**2)
        errors = np.sqrt(units / (units - 1) * np.maximum(squares, 0)) / under
        gaps = ratios - value
        scaled = gaps / np.maximum(errors / error, 1e-9)  # a resample of equal rows has no error: its limit is far away
        found.append(value - scaled)
    return np.sort(np.concatenate(found)), 1


def halves_of(above: Floats, below: Floats, spec: EvaluateSpec) -> tuple[Floats, int]:
    """Ratios of random halves of the rows (sorted), and how many draws were the rows themselves or an empty half."""
    values = np.sort(np.concatenate([(half @ above) / (half @ below) for half in halves(len(above), spec)]))
    return values, 1 + spec.resamples - len(values)


def halves(units: int, spec: EvaluateSpec) -> Iterator[Floats]:
    """Random halves of the units as weights (draws, units), without the empty ones; the same for the same seed."""
    generator, at_once = np.random.default_rng([spec.seed, 1]), max(1, _CELLS // units)
    for start in range(0, spec.resamples, at_once):
        drawn = generator.integers(0, 2, size=(min(at_once, spec.resamples - start), units)).astype(np.float64)
        yield drawn[drawn.any(axis=1)]


def posterior_weights(n: int, further: int, *, spec: EvaluateSpec, groups: Sequence[Hashable] | None = None) -> Iterator[Floats]:
    """Weights (draws, n + further) of a Bayesian bootstrap (Rubin 1981) over rows or groups.

    The `further` rows, which were never seen, weigh one row together: what never happened in n rows is rare, not impossible.
    """
    units, index = numbered_units(n, groups)
    generator, at_once = np.random.default_rng([spec.seed, 3]), max(1, _CELLS // (n + further))
    for start in range(0, spec.resamples, at_once):
        draws = min(at_once, spec.resamples - start)
        seen = generator.standard_exponential((draws, units))[:, index]
        yield np.concatenate([seen, generator.standard_gamma(1 / further, (draws, further))], axis=1)


def limits(values: Floats, against: int, alpha: float) -> tuple[float, float, float]:
    """The interval and the two-sided p-value of 0 from sorted typical values; `against` are beyond either end."""
    total = len(values) + against
    needed = math.ceil(alpha / 2 * total) - against  # so many values at or beyond a limit are enough to keep it
    low, high = (float(values[needed - 1]), float(values[-needed])) if needed > 0 else (-math.inf, math.inf)
    beyond = min(np.searchsorted(values, 0.0, side="right"), len(values) - np.searchsorted(values, 0.0, side="left"))
    return low, high, min(1.0, 2 * (int(beyond) + against) / total)


def mean_over_seeds(values: tuple[float, ...], confidence: float) -> Estimate:
    """The mean with Student's t interval between seeds, on the same rows."""
    count, mean = len(values), math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    found = Estimate(mean, mean, mean, count, f"t over {count} seeds", confidence)
    if error <= 1e-12 * abs(mean):
        return found.without(f"all {count} seeds are equal")
    reach = float(special.stdtrit(count - 1, 0.5 + confidence / 2)) * error
    return replace(found, low=mean - reach, high=mean + reach)


def bootstrap(
    statistic: Statistic,
    n: int,
    *,
    spec: EvaluateSpec,
    groups: Sequence[Hashable] | None = None,
) -> Estimate:
    """`statistic` of all rows with a bias-corrected, accelerated bootstrap interval (Efron 1987) over rows or `groups` (n,)."""
    if n < 1:
        raise DataError("An interval needs at least one row: 0 rows. Evaluate on a file that has rows.")
    units, index = numbered_units(n, groups)
    value = float(statistic(np.ones((1, n)))[0])
    draws = np.sort(np.concatenate([statistic(weights) for weights in resample_weights(n, spec=spec, groups=groups)]))
    tail = (1 - spec.confidence) / 2
    levels = (tail, 1 - tail)
    if draws[0] < draws[-1]:
        levels = _bca_levels(value, draws, jackknife=_jackknife(statistic, units, index), levels=levels)
    low, high = (float(edge) for edge in np.quantile(draws, levels))
    over = "" if groups is None else f" over {units} groups"
    return Estimate(value, low, high, n, f"BCa bootstrap{over}", spec.confidence, spec.seed)


def bootstrap_or_words(
    statistic: Statistic, n: int, *, spec: EvaluateSpec, groups: Sequence[Hashable] | None = None
) -> Estimate:
    """The same, or words where rows (or groups) are too few, or the statistic is equal in all resamples."""
    return or_words(bootstrap(statistic, n, spec=spec, groups=groups), groups)


def or_words(found: Estimate, groups: Sequence[Hashable] | None) -> Estimate:
    """A resampled interval, or words where rows (or groups) are too few, or the value is equal in all resamples."""
    units, _ = numbered_units(found.n, groups)
    if units < FEWEST:
        return found.without(f"too few {'rows' if groups is None else 'groups'} ({units})")
    return found if found.low < found.high else found.without("equal in all resamples")


def resample_weights(n: int, *, spec: EvaluateSpec, groups: Sequence[Hashable] | None = None) -> Iterator[Floats]:
    """Counts of each row in each of `spec.resamples` resamples, as (draws, n) arrays; the same for the same seed."""
    units, index = numbered_units(n, groups)
    generator = np.random.default_rng(spec.seed)
    at_once = max(1, _CELLS // max(n, units))
    for start in range(0, spec.resamples, at_once):
        draws = min(at_once, spec.resamples - start)
        chosen = generator.integers(0, units, size=(draws, units)) + units * np.arange(draws)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=draws * units).reshape(draws, units).astype(np.float64)
        yield counts if groups is None else counts[:, index]


def numbered_units(n: int, groups: Sequence[Hashable] | None) -> tuple[int, Integers]:
    """The number of independent units, rows or groups, and the unit of each row (n,)."""
    if groups is None:
        return n, np.arange(n)
    if len(groups) != n:
        raise DataError(f"There are {len(groups)} group ids for {n} rows; expected one for each row.")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    return len(numbers), index


def _jackknife(statistic: Statistic, units: int, index: Integers) -> Floats:
    """The statistic without each unit, or without each of 400 blocks of units if there are more."""
    if units < 2:
        return np.zeros(1)
    blocks = np.arange(units) * min(units, _JACKKNIFE_BLOCKS) // units
    block_of_row = blocks[index]
    count = int(blocks[-1]) + 1
    at_once = max(1, _CELLS // len(index))
    parts = [
        statistic((block_of_row[None, :] != np.arange(start, min(start + at_once, count))[:, None]).astype(np.float64))
        for start in range(0, count, at_once)
    ]
    return np.concatenate(parts)


def _bca_levels(value: float, draws: Floats, *, jackknife: Floats, levels: tuple[float, float]) -> tuple[float, float]:
    """The quantile levels that replace `levels`:  Φ(z0 + (z0 + z) / (1 - a (z0 + z)))  (Efron 1987, equation 4.5)."""
    below = (np.sum(draws < value) + 0.5 * np.sum(draws == value)) / len(draws)
    z0 = float(special.ndtri(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws))))
    spread = jackknife.mean() - jackknife
    size = float(np.sum(spread**2) ** 1.5)
    acceleration = float(np.sum(spread**3)) / (6 * size) if size > 0 else 0.0
    shifted = z0 + special.ndtri(np.asarray(levels))
    moved = special.ndtr(z0 + shifted / np.maximum(1 - acceleration * shifted, 1e-9))
    return float(moved[0]), float(moved[1])
