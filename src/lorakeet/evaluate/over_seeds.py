"""Two settings compared over several training seeds: an interval that knows both kinds of noise, the rows and the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import special

from lorakeet.errors import DataError
from lorakeet.evaluate.compare import Comparison, compare_losses, paired_verdict
from lorakeet.evaluate.intervals import Estimate, Floats
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.spec import EvaluateSpec


def compare_over_seeds(left: Sequence[RowLosses], right: Sequence[RowLosses], spec: EvaluateSpec) -> Comparison:
    """The difference in nats a token of two settings, each trained with as many seeds, on the same rows.

    Rows alone would tell two adapters apart, not two settings: the same settings with another seed are another adapter. So the
    variance of the mean over N seeds and n rows (or groups) is the sum of both,

        V = var(lᵢ)/N + var(rᵢ)/N + var(dⱼ)/n      lᵢ, rᵢ the losses of seed i, dⱼ row j's share of the mean difference

    which counts the noise of rows within a seed twice, and does not take off what a seed has in common on both sides, so that it
    errs on the wide side; pairs of seeds would have half the degrees of freedom, and these are few. The interval is Student's
    with Satterthwaite's, V² / Σ (term²/(its number − 1)). One seed, or one row, has no variance: then it is `compare_losses` of
    the rows' means. Raises DataError for sides that do not pair.
    """
    if len(left) != len(right) or not left:
        raise DataError(f"There are {len(left)} seeds on one side and {len(right)} on the other; expected as many, at least 1.")
    if any(not np.array_equal(one.tokens, left[0].tokens) or one.groups != left[0].groups for one in (*left, *right)):
        raise DataError(f"Not all seeds of '{left[0].system}' and '{right[0].system}' were scored on the same rows.")
    means = _mean(left), _mean(right)
    gap, tokens = means[0].losses - means[1].losses, left[0].tokens.astype(np.float64)
    residuals = _residuals(gap, tokens, left[0].groups)
    if len(left) < 2 or len(residuals) < 2:
        return compare_losses(*means, spec)
    parts = (*(np.array([one.losses.sum() for one in side]) / tokens.sum() for side in (left, right)), residuals)
    squares = [float(np.var(part, ddof=1)) / len(part) for part in parts]
    value, error = float(gap.sum() / tokens.sum()), math.sqrt(sum(squares))
    if error == 0:
        return compare_losses(*means, spec)
    freedom = sum(squares) ** 2 / sum(one**2 / (len(part) - 1) for one, part in zip(squares, parts, strict=True))
    reach = float(special.stdtrit(freedom, 0.5 + spec.confidence / 2)) * error
    method = f"t over rows and {len(left)} seeds"
    difference = Estimate(value, value - reach, value + reach, len(tokens), method, spec.confidence)
    p_value = 2 * float(special.stdtr(freedom, -abs(value) / error))
    verdict = paired_verdict(difference, p_value, higher_is_better=False)
    return Comparison(left[0].system, right[0].system, "loss", difference, p_value, method, False, verdict)


def _mean(runs: Sequence[RowLosses]) -> RowLosses:
    return replace(runs[0], losses=np.mean([one.losses for one in runs], axis=0))


def _residuals(gap: Floats, tokens: Floats, groups: Sequence[object] | None) -> Floats:
    """What each row, or group of rows, adds to Σgap/Σtokens beyond its part, times their number: the ratio's linearisation."""
    found = gap - gap.sum() / tokens.sum() * tokens
    if groups is not None:
        numbers: dict[object, int] = {}
        index = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
        found = np.bincount(index, weights=found)
    residuals: Floats = found * len(found) / tokens.sum()
    return residuals
