"""Compares systems on the same rows: paired differences with interval and test of one procedure, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import special

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import HIGHER_IS_BETTER, Answers, measure
from lorakeet.evaluate.intervals import UNBOUNDED, Estimate, Floats, Statistic, ratio, ratio_with_test
from lorakeet.evaluate.likelihood import RowLosses, measure_losses
from lorakeet.evaluate.paired import (
    MCNEMAR,
    RANDOMISATION,
    Paired,
    macro_f1_difference,
    score_difference,
    statistic_difference,
)
from lorakeet.evaluate.spec import EvaluateSpec

Verdict = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Comparison:
    """left - right in one metric on the same rows: interval, test, verdict on `left`; `paired` for answers with a truth."""

    left: str
    right: str
    metric: str
    difference: Estimate
    p_value: float
    test: str
    higher_is_better: bool
    verdict: Verdict
    paired: Paired | None = None


def pair(left: Answers, right: Answers) -> Paired:
    """Counts the rows that both, one or neither of two systems answers correctly."""
    mine, other = left.correct, right.correct
    return Paired(int(np.sum(mine & other)), int(np.sum(mine & ~other)), int(np.sum(~mine & other)), int(np.sum(~mine & ~other)))


def compare_answers(left: Answers, right: Answers, spec: EvaluateSpec) -> tuple[Comparison, ...]:
    """Paired comparisons in accuracy, macro-F1 and log-loss.

    Accuracy has McNemar's test (over groups that of a mean); macro-F1 and log-loss have those of evaluate/paired.
    """
    _same_rows(left, right)
    paired, groups = pair(left, right), left.groups
    right_or_not = left.correct.astype(np.float64) - right.correct
    found: dict[str, Tested] = {
        "accuracy": _of_means(right_or_not, np.ones(paired.n), spec, groups, (-1.0, 1.0), paired),
        "macro_f1": (*macro_f1_difference(left, right, spec), RANDOMISATION),
        "log_loss": _of_means(left.surprise - right.surprise, np.ones(paired.n), spec, groups),
    }
    systems = (left.system, right.system)
    return tuple(
        _comparison(systems, metric, tested, higher_is_better=HIGHER_IS_BETTER[metric], paired=paired)
        for metric, tested in found.items()
    )


Tested = tuple[Estimate, float, str]  # the difference with its interval, the p-value, and the name of the test


def _of_means(
    gaps: Floats,
    weights: Floats,
    spec: EvaluateSpec,
    groups: Sequence[Hashable] | None,
    bounds: tuple[float, float] = UNBOUNDED,
    paired: Paired | None = None,
) -> Tested:
    """Interval and test of one procedure: McNemar for `paired` answers without groups, else those of a ratio of sums."""
    if paired is not None and groups is None:
        return (*score_difference(paired, spec.confidence), MCNEMAR)
    return (*ratio_with_test(gaps, weights, spec=spec, groups=groups, bounds=bounds), RANDOMISATION)


def _comparison(
    systems: tuple[str, str], metric: str, tested: Tested, *, higher_is_better: bool, paired: Paired | None = None
) -> Comparison:
    difference, p_value, test = tested
    verdict = paired_verdict(difference, higher_is_better=higher_is_better)
    return Comparison(*systems, metric, difference, p_value, test, higher_is_better, verdict, paired)


def compare_losses(left: RowLosses, right: RowLosses, spec: EvaluateSpec) -> Comparison:
    """The paired difference in nats per token, Σ(left - right) / Σ tokens, for rows of any kind; negative is better."""
    if not np.array_equal(left.tokens, right.tokens) or left.groups != right.groups:
        raise DataError(
            f"'{left.system}' and '{right.system}' were scored on different rows or tokens; score the same file with both."
        )
    tokens, gap = left.tokens.astype(np.float64), left.losses - right.losses
    tested = _of_means(gap, tokens, spec, left.groups)
    return _comparison((left.system, right.system), "loss", tested, higher_is_better=False)


def compare_values(
    systems: tuple[str, str],
    metric: str,
    values: tuple[Floats, Floats],
    spec: EvaluateSpec,
    *,
    groups: Sequence[Hashable] | None = None,
    higher_is_better: bool = True,
    bounds: tuple[float, float] = UNBOUNDED,
) -> Comparison:
    """The paired difference of the mean of a metric between two systems' values (n,) on the same rows.

    Values of 0 and 1 alone, wrong and right, have McNemar's test, others and groups that of a mean within `bounds`.
    """
    left, right = values
    gap, paired = left - right, None
    if (right == 0.5).all() and np.isin(left, (0.0, 0.5, 1.0)).all() and groups is None:  # against chance: won, lost, neither
        won, lost = int(np.sum(left == 1)), int(np.sum(left == 0))
        found, p_value = score_difference(Paired(0, won, lost, len(left) - won - lost), spec.confidence)
        tested = (found.map(lambda share: share / 2), p_value, MCNEMAR)
        return _comparison(systems, metric, tested, higher_is_better=higher_is_better)
    if higher_is_better and np.isin(left, (0.0, 1.0)).all() and np.isin(right, (0.0, 1.0)).all():
        counts = (left == 1) & (right == 1), (left == 1) & (right == 0), (left == 0) & (right == 1), (left == 0) & (right == 0)
        paired = Paired(*(int(np.sum(each)) for each in counts))
        bounds = (-1.0, 1.0)
    tested = _of_means(gap, np.ones(len(left)), spec, groups, bounds, paired)
    return _comparison(systems, metric, tested, higher_is_better=higher_is_better, paired=paired)


def compare_statistics(
    systems: tuple[str, str],
    metric: str,
    statistics: tuple[Statistic, Statistic],
    n: int,
    spec: EvaluateSpec,
    *,
    groups: Sequence[Hashable] | None = None,
) -> Comparison:
    """The paired difference in a metric of all n rows together, higher is better, by randomisation."""
    tested = (*statistic_difference(*statistics, n, spec, groups), RANDOMISATION)
    return _comparison(systems, metric, tested, higher_is_better=True)


def holm(
    compare: Sequence[Callable[[EvaluateSpec], Comparison]], spec: EvaluateSpec, *, beside: int = 0
) -> tuple[Comparison, ...]:
    """Comparisons adjusted for their number (Holm 1979): p-values, verdicts and intervals hold jointly.

    The k-th smallest of m p-values is multiplied by m − k + 1, and none is below the one before it. Each interval is of the
    confidence that fits its factor f, 1 − (1 − confidence)/f. `beside` counts further comparisons that the same rows ruled out
    before, taken as the largest p-values.
    """
    alone = [one(spec) for one in compare]
    order = sorted(range(len(alone)), key=lambda index: alone[index].p_value)
    found, last = list(alone), 0.0
    for rank, index in enumerate(order):
        one = alone[index]
        last = max(last, min(1.0, (len(order) + beside - rank) * one.p_value))
        factor = last / one.p_value if one.p_value else len(order) + beside - rank
        wider = replace(spec, confidence=1 - (1 - spec.confidence) / factor)
        test = f"{one.test}, Holm over {len(order) + beside}"
        found[index] = replace(compare[index](wider), p_value=last, test=test)
    return tuple(found)


def paired_verdict(difference: Estimate, *, higher_is_better: bool) -> Verdict:
    """The verdict on the left system: "no difference shown" if the interval touches zero, which is if the test says so."""
    if not difference.excludes_zero:
        return "no difference shown"
    return "better" if (difference.low > 0) == higher_is_better else "worse"


def _same_rows(left: Answers, right: Answers) -> None:
    if left.labels != right.labels or not np.array_equal(left.truth, right.truth) or left.groups != right.groups:
        raise DataError(
            f"'{left.system}' and '{right.system}' did not answer the same rows with the same labels "
            f"({len(left.truth)} rows, {len(left.labels)} labels; {len(right.truth)} rows, {len(right.labels)} labels). "
            "Answer the same file with both."
        )


def compare_over_seeds(left: Sequence[RowLosses], right: Sequence[RowLosses], spec: EvaluateSpec) -> Comparison:
    """The difference in nats per token of two settings, each trained with N seeds, on the same rows.

    Rows alone distinguish two adapters, not two settings: another seed gives another adapter. So the variance of the mean over N
    seeds and n rows (or groups) is the sum of both,

        V = var(lᵢ)/N + var(rᵢ)/N + var(dⱼ)/n      lᵢ, rᵢ the losses of seed i, dⱼ row j's share of the mean difference

    It counts the noise of rows within a seed twice and ignores what both sides of a seed have in common, so it errs on the wide
    side; pairing seeds would halve the few degrees of freedom. The interval is Student's t with Satterthwaite's degrees,
    V² / Σ (term²/(its number − 1)). One seed, or one row, has no variance: then `compare_losses` of the rows' means is used.
    Raises DataError for sides that do not pair.
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
    return _comparison((left[0].system, right[0].system), "loss", (difference, p_value, method), higher_is_better=False)


def _mean(runs: Sequence[RowLosses]) -> RowLosses:
    return replace(runs[0], losses=np.mean([one.losses for one in runs], axis=0))


def _residuals(gap: Floats, tokens: Floats, groups: Sequence[object] | None) -> Floats:
    """The linearisation of the ratio Σgap/Σtokens: each row's (or group's) residual, times their number."""
    found = gap - gap.sum() / tokens.sum() * tokens
    if groups is not None:
        numbers: dict[object, int] = {}
        index = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
        found = np.bincount(index, weights=found)
    residuals: Floats = found * len(found) / tokens.sum()
    return residuals


Scores = Answers | RowLosses


def per_row(scores: Scores) -> Floats:
    """The loss of each row in nats (n,): −log p of the right label, or the summed loss of its tokens."""
    return scores.surprise if isinstance(scores, Answers) else scores.losses


def measure_scores(scores: Scores, spec: EvaluateSpec) -> dict[str, Estimate]:
    """Every metric of what one system scored, with its interval."""
    return measure(scores, spec) if isinstance(scores, Answers) else measure_losses(scores, spec)


def compare_scores(left: Scores, right: Scores, spec: EvaluateSpec) -> tuple[Comparison, ...]:
    """What decides between two systems: accuracy and log-loss for labelled rows, else the loss per token."""
    if isinstance(left, Answers) and isinstance(right, Answers):
        return tuple(found for found in compare_answers(left, right, spec) if found.metric != "macro_f1")
    if isinstance(left, RowLosses) and isinstance(right, RowLosses):
        return (compare_losses(left, right, spec),)
    raise DataError(f"'{left.system}' and '{right.system}' were measured in different ways; measure both in the same way.")


def surviving_share(base: Scores, adapter: Scores, other: Scores, spec: EvaluateSpec) -> Estimate:
    """Σ(base − other) / Σ(base − adapter): 1 if `other` is as good as the adapter, 0 if as good as the base.

    Uses log-loss for labelled rows, else the loss. Raises DataError if the rows differ or the adapter gained nothing.
    """
    rows = [per_row(scores) for scores in (base, adapter, other)]
    if len({len(values) for values in rows}) > 1:
        raise DataError(f"The systems were measured on {', '.join(str(len(values)) for values in rows)} rows; expected the same.")
    whole, kept = rows[0] - rows[1], rows[0] - rows[2]
    if whole.sum() <= 0:
        raise DataError(
            f"The adapter gained nothing over its base on these {len(whole)} held-out rows ({whole.mean():+.4f} nats per row), "
            "so it has no gain to retain. Train it further first."
        )
    return ratio(kept, whole, spec=spec, groups=base.groups)
