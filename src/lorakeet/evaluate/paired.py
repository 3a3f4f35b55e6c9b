"""Differences on the same rows: interval and test are one procedure, so that they never contradict each other.

    interval = every difference that the test does not reject        zero lies within it  ⟺  p ≥ 1 − confidence

Answers that are right or wrong have McNemar's test, which is Tango's (1998) score test of a difference of 0, and its exact form,
which holds for any number of rows. All else has the randomisation test, inverted by Hartigan's (1969) typical values: the
statistic on random halves of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from lorakeet.evaluate.intervals import Estimate, Floats, Statistic, numbered_units
from lorakeet.evaluate.spec import EvaluateSpec

MCNEMAR, RANDOMISATION = "McNemar", "paired randomisation"
_CELLS = 2_000_000  # weights in memory at once
_HALVINGS = 60  # of the range in which a limit lies


@dataclass(frozen=True)
class Paired:
    """Row counts by which of two systems is right; `only_left` and `only_right` are discordant."""

    both: int
    only_left: int
    only_right: int
    neither: int

    @property
    def n(self) -> int:
        return self.both + self.only_left + self.only_right + self.neither


def score_difference(paired: Paired, confidence: float) -> tuple[Estimate, float]:
    """(only left − only right)/n with Tango's score interval, and the p-value of a difference of 0 by McNemar's (1947) test.

        T(d) = (b − c − n·d) / sqrt(n·(2q + d·(1 − d)))      b only left, c only right, q the likeliest share of c at d
        T(0) = (b − c) / sqrt(b + c)
        exact: 2·P(X ≤ min(b, c)), X the heads of b + c fair coins

    T is normal for many rows only: it has 0.0455 for 0 against 4 rows, where coins fall so once in 8 times. So the p-value is the
    larger one of both tests, and an interval that excludes 0 by T alone ends at 0.
    Rows so few that even a sign test of them all shows nothing, 2^(1−n) ≥ 1 − confidence, have the interval −1 to 1.
    """
    b, c, n = paired.only_left, paired.only_right, paired.n
    alpha = 1 - confidence
    at_zero = abs(b - c) / math.sqrt(b + c) if b + c else 0.0
    p_value = min(1.0, max(2 * float(special.ndtr(-at_zero)), 2 * float(special.bdtr(min(b, c), b + c, 0.5))))
    low, high = -1.0, 1.0
    if 2.0 ** (1 - n) < alpha:
        z = -float(special.ndtri(alpha / 2))
        low = _lower_limit(b, c, n, z, shown=p_value < alpha)
        high = 0.0 - _lower_limit(c, b, n, z, shown=p_value < alpha)  # a limit of 0 has no sign
    return Estimate((b - c) / n, low, high, n, "McNemar inverted (Tango)", confidence), p_value


def _lower_limit(b: int, c: int, n: int, z: float, *, shown: bool) -> float:
    """The lowest difference with T ≤ z: above 0 only where a difference is `shown` and b > c, else between −1 and 0."""
    above_zero = shown and b > c
    below, above = (0.0, (b - c) / n) if above_zero else (-1.0, min(0.0, (b - c) / n))
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        linear = -b - c + (2 * n - b + c) * middle
        q = (math.sqrt(max(0.0, linear**2 + 8 * n * c * middle * (1 - middle))) - linear) / (4 * n)
        variance = max(n * (2 * q + middle * (1 - middle)), 1e-300)
        below, above = (middle, above) if (b - c - n * middle) > z * math.sqrt(variance) else (below, middle)
    return above if above_zero or above > -1 + 1e-9 else -1.0


def typical_difference(
    statistic: Statistic, n: int, *, spec: EvaluateSpec, groups: Sequence[Hashable] | None = None
) -> tuple[Estimate, float]:
    """`statistic` (a difference) of n rows with the interval and the p-value of the randomisation test on rows, or on `groups`.

    The test exchanges the two systems on random rows. For a mean d of differences it rejects a value v from below as often as
    random halves of the rows have a mean ≤ v: flipping the half H gives as much as the rows do if Σ_H (d − v) ≤ 0. So quantiles
    of the halves' values are the limits. Exact at any n if differences scatter symmetrically. The empty half counts against
    either side: with fewer than 6 rows (or groups) a 95 % interval has no end.
    """
    count, index = numbered_units(n, groups)
    generator = np.random.default_rng([spec.seed, 1])
    at_once, found = max(1, _CELLS // max(n, count)), []
    for start in range(0, spec.resamples, at_once):
        draws = min(at_once, spec.resamples - start)
        halves = generator.integers(0, 2, size=(draws, count)).astype(np.float64)
        halves = halves[halves.any(axis=1)]
        found.append(statistic(halves if groups is None else halves[:, index]))
    values = np.sort(np.concatenate(found))
    against = 1 + spec.resamples - len(values)  # the rows as they are, and empty halves
    low, high, p_value = _limits(values, against, 1 - spec.confidence)
    over = "" if groups is None else f" over {count} groups"
    value = float(statistic(np.ones((1, n)))[0])
    return Estimate(value, low, high, n, f"randomisation inverted{over}", spec.confidence, spec.seed), p_value


def _limits(values: Floats, against: int, alpha: float) -> tuple[float, float, float]:
    """The interval and the two-sided p-value of 0 from sorted typical values; `against` are beyond either end."""
    total = len(values) + against
    needed = math.ceil(alpha / 2 * total) - against  # so many values at or beyond a limit are enough to keep it
    low, high = (float(values[needed - 1]), float(values[-needed])) if needed > 0 else (-math.inf, math.inf)
    beyond = min(np.searchsorted(values, 0.0, side="right"), len(values) - np.searchsorted(values, 0.0, side="left"))
    return low, high, min(1.0, 2 * (int(beyond) + against) / total)
