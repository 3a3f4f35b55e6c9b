"""Differences on the same rows: interval and test are one procedure, so that they never contradict each other.

    interval = every difference that the test does not reject        zero lies within it  ⟺  p ≥ 1 − confidence

Answers that are right or wrong have McNemar's test, which is Tango's (1998) score test of a difference of 0, and its exact form,
which holds for any number of rows. All else has the randomisation test, inverted by Hartigan's (1969) typical values: the
statistic on random halves of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from lorakeet.evaluate.answers import Answers, macro_f1, macro_f1_with_unseen, too_few_for_macro_f1
from lorakeet.evaluate.intervals import FEWEST, Estimate, Statistic, halves, limits, numbered_units, posterior_weights
from lorakeet.evaluate.spec import EvaluateSpec

MCNEMAR, RANDOMISATION, UNSEEN = "McNemar", "paired randomisation", "unseen share"
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


def macro_f1_difference(left: Answers, right: Answers, spec: EvaluateSpec) -> tuple[Estimate, float]:
    """The difference of macro-F1 with its interval and the p-value of 0."""
    n, groups = len(left.truth), left.groups
    units, index = numbered_units(n, groups)
    value = float((macro_f1(left)(np.ones((1, n))) - macro_f1(right)(np.ones((1, n))))[0])
    over = "" if groups is None else f" over {units} groups"
    found = Estimate(value, value, value, n, f"randomisation and posterior{over}", spec.confidence, spec.seed)
    if (left.predicted == right.predicted).all():
        return replace(found, why_none=f"equal on all {n} rows"), 1.0
    if why := too_few_for_macro_f1(left):
        return found.without(why, (-1.0, 1.0)), 1.0
    random = [macro_f1(left)(half[:, index]) - macro_f1(right)(half[:, index]) for half in halves(units, spec)]
    mine, other = (macro_f1_with_unseen(each, right=rows) for each, rows in ((left, (1, 1, 0, 0)), (right, (1, 0, 1, 0))))
    unseen = posterior_weights(n, 4 * len(left.labels), spec=spec, groups=groups)
    beyond = 1 + spec.resamples - sum(map(len, random))
    found_by = [
        limits(np.sort(np.concatenate(drawn)), against, 1 - spec.confidence)
        for drawn, against in ((random, beyond), ([mine(weights) - other(weights) for weights in unseen], 1))
    ]
    low, high, p_value = (pick(each) for pick, each in zip((min, max, max), zip(*found_by, strict=True), strict=True))
    return replace(found, low=low, high=high), p_value


def statistic_difference(
    left: Statistic, right: Statistic, n: int, spec: EvaluateSpec, groups: Sequence[Hashable] | None
) -> tuple[Estimate, float]:
    """The difference of any metric of all rows together, with the interval and the p-value of randomisation alone."""
    units, index = numbered_units(n, groups)
    value = float((left(np.ones((1, n))) - right(np.ones((1, n))))[0])
    over, unit = ("", "rows") if groups is None else (f" over {units} groups", "groups")
    found = Estimate(value, value, value, n, f"randomisation inverted{over}", spec.confidence, spec.seed)
    drawn = [left(half[:, index]) - right(half[:, index]) for half in halves(units, spec)]
    values = np.sort(np.concatenate(drawn))
    if values[0] == values[-1]:
        return replace(found, why_none=f"equal on all {units} {unit}") if value == 0 else found.without("equal in all draws"), 1.0
    if units < FEWEST:
        return found.without(f"too few {unit} ({units})"), 1.0
    low, high, p_value = limits(values, 1 + spec.resamples - len(values), 1 - spec.confidence)
    return replace(found, low=low, high=high), p_value
