"""Estimates with intervals: closed formulas for shares, the bootstrap for everything else.

A statistic is written as a function of *weights*: given weights (draws, n), one row per resample, it returns (draws,)
values. Resampling rows is then drawing counts, resampling groups is drawing counts of groups, the jackknife is a zero
weight, and all draws are computed in a few matrix products.
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


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, number of rows, method, and seed if the method is random."""

    value: float
    low: float
    high: float
    n: int
    method: str
    confidence: float = 0.95
    seed: int | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.n}"

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
    """The share of true flags: Wilson for independent rows, a bootstrap over groups otherwise."""
    if groups is None:
        return proportion(int(np.sum(flags)), len(flags), confidence=spec.confidence)
    return mean(np.asarray(flags, dtype=np.float64), spec=spec, groups=groups)


def mean(values: Floats, *, spec: EvaluateSpec, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of `values` (n,) with a BCa bootstrap interval."""
    return ratio(values, np.ones(len(values)), spec=spec, groups=groups)


def ratio(numerators: Floats, denominators: Floats, *, spec: EvaluateSpec, groups: Sequence[Hashable] | None = None) -> Estimate:
    """sum(numerators) / sum(denominators) over rows, such as nats over tokens, with a BCa bootstrap interval."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    return bootstrap(lambda weights: (weights @ above) / (weights @ below), len(above), spec=spec, groups=groups)


def bootstrap(
    statistic: Statistic,
    n: int,
    *,
    spec: EvaluateSpec,
    groups: Sequence[Hashable] | None = None,
    method: Literal["bca", "percentile"] = "bca",
) -> Estimate:
    """`statistic` of all rows with a bootstrap interval over rows, or over `groups` (n,) if given.

    bca: bias-corrected and accelerated (Efron 1987). percentile: quantiles of the draws.
    """
    if n < 1:
        raise DataError("An interval needs at least one row: 0 rows. Evaluate on a file that has rows.")
    units, index = numbered_units(n, groups)
    value = float(statistic(np.ones((1, n)))[0])
    draws = np.sort(np.concatenate([statistic(weights) for weights in resample_weights(n, spec=spec, groups=groups)]))
    tail = (1 - spec.confidence) / 2
    levels = (tail, 1 - tail)
    if method == "bca" and draws[0] < draws[-1]:
        levels = _bca_levels(value, draws, jackknife=_jackknife(statistic, units, index), levels=levels)
    low, high = (float(edge) for edge in np.quantile(draws, levels))
    name = "BCa bootstrap" if method == "bca" else "percentile bootstrap"
    over = "" if groups is None else f" over {units} groups"
    return Estimate(value, low, high, n, name + over, spec.confidence, spec.seed)


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
