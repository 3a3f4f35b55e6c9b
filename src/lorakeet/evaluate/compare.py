"""Compares systems on the same rows: paired differences, exact or randomisation tests, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import HIGHER_IS_BETTER, Answers, accuracy, log_loss, macro_f1
from lorakeet.evaluate.intervals import Estimate, Floats, Statistic, bootstrap, ratio
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.spec import EvaluateSpec

Verdict = Literal["better", "worse", "no difference shown"]
_CELLS = 2_000_000


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


def mcnemar(only_left: int, only_right: int) -> float:
    """The two-sided p-value of the exact McNemar test: discordant rows fall on either side with probability 1/2."""
    if only_left + only_right == 0:
        return 1.0
    return min(1.0, 2 * float(special.bdtr(min(only_left, only_right), only_left + only_right, 0.5)))


def pair(left: Answers, right: Answers) -> Paired:
    """Counts the rows that both, one or neither of two systems answers correctly."""
    mine, other = left.correct, right.correct
    return Paired(int(np.sum(mine & other)), int(np.sum(mine & ~other)), int(np.sum(~mine & other)), int(np.sum(~mine & ~other)))


def compare_answers(left: Answers, right: Answers, spec: EvaluateSpec) -> tuple[Comparison, ...]:
    """Paired comparisons in accuracy, macro-F1 and log-loss.

    Accuracy is tested by exact McNemar (over groups: by randomisation); macro-F1 and log-loss by randomisation, which
    exchanges the two systems' answers on random rows (Noreen 1989). A verdict needs both test and interval.
    """
    _same_rows(left, right)
    stacked = Answers(
        f"{left.system}|{right.system}", left.labels, np.tile(left.truth, 2), np.concatenate([left.log_probs, right.log_probs])
    )
    paired = pair(left, right)
    results = []
    for metric, make in (("accuracy", accuracy), ("macro_f1", macro_f1), ("log_loss", log_loss)):
        difference = _difference(make(left), make(right), n=paired.n, spec=spec, groups=left.groups)
        counts = paired if metric == "accuracy" else None
        difference, p_value, test = _tested(difference, counts, make(stacked), spec=spec, groups=left.groups)
        higher = HIGHER_IS_BETTER[metric]
        verdict = paired_verdict(difference, p_value, higher_is_better=higher)
        results.append(Comparison(left.system, right.system, metric, difference, p_value, test, higher, verdict, paired))
    return tuple(results)


def _tested(
    difference: Estimate,
    paired: Paired | None,
    stacked: Statistic,
    *,
    spec: EvaluateSpec,
    groups: Sequence[Hashable] | None,
) -> tuple[Estimate, float, str]:
    """The difference, widened if it is flat, its p-value and the test: exact McNemar for `paired` answers without groups."""
    if paired is not None and groups is None:
        return _widen_if_flat(difference, paired), mcnemar(paired.only_left, paired.only_right), "exact McNemar"
    return difference, randomisation(stacked, difference.n, spec=spec, groups=groups), "paired randomisation"


def compare_losses(left: RowLosses, right: RowLosses, spec: EvaluateSpec) -> Comparison:
    """The paired difference in nats per token, Σ(left - right) / Σ tokens, for rows of any kind; negative is better."""
    if not np.array_equal(left.tokens, right.tokens) or left.groups != right.groups:
        raise DataError(
            f"'{left.system}' and '{right.system}' were scored on different rows or tokens; score the same file with both."
        )
    n, tokens = len(left.tokens), left.tokens.astype(np.float64)
    gap = left.losses - right.losses
    difference = bootstrap(lambda weights: (weights @ gap) / (weights @ tokens), n, spec=spec, groups=left.groups)
    summed = np.concatenate([left.losses, right.losses]) / tokens.sum()
    difference, p_value, test = _tested(difference, None, lambda weights: weights @ summed, spec=spec, groups=left.groups)
    verdict = paired_verdict(difference, p_value, higher_is_better=False)
    return Comparison(left.system, right.system, "loss", difference, p_value, test, False, verdict)


def compare_values(
    systems: tuple[str, str],
    metric: str,
    values: tuple[Floats, Floats],
    spec: EvaluateSpec,
    *,
    groups: Sequence[Hashable] | None = None,
) -> Comparison:
    """The paired difference of the mean of a metric, higher is better, between two systems' values (n,) on the same rows.

    Values of 0 and 1 alone are tested by exact McNemar (over groups: by randomisation), others by randomisation.
    """
    left, right = values
    n = len(left)
    gap = left - right
    difference = bootstrap(lambda weights: (weights @ gap) / weights.sum(axis=1), n, spec=spec, groups=groups)
    paired = None
    if np.isin(left, (0.0, 1.0)).all() and np.isin(right, (0.0, 1.0)).all():
        counts = (left == 1) & (right == 1), (left == 1) & (right == 0), (left == 0) & (right == 1), (left == 0) & (right == 0)
        paired = Paired(*(int(np.sum(each)) for each in counts))
    both = np.concatenate([left, right]) / n
    difference, p_value, test = _tested(difference, paired, lambda weights: weights @ both, spec=spec, groups=groups)
    verdict = paired_verdict(difference, p_value, higher_is_better=True)
    return Comparison(*systems, metric, difference, p_value, test, True, verdict, paired)


def holm(comparisons: Sequence[Comparison], *, beside: int = 0) -> tuple[Comparison, ...]:
    """Adjusts p-values for multiple comparisons (Holm 1979); the verdicts hold jointly.

    The k-th smallest of m p-values is multiplied by m − k + 1, and none is below the one before it. `beside` counts further
    comparisons that the same rows ruled out before, taken as the largest p-values.
    """
    order = sorted(range(len(comparisons)), key=lambda index: comparisons[index].p_value)
    found, last = list(comparisons), 0.0
    for rank, index in enumerate(order):
        one = comparisons[index]
        last = max(last, min(1.0, (len(order) + beside - rank) * one.p_value))
        verdict = paired_verdict(one.difference, last, higher_is_better=one.higher_is_better)
        found[index] = replace(one, p_value=last, test=f"{one.test}, Holm over {len(order) + beside}", verdict=verdict)
    return tuple(found)


def randomisation(stacked: Statistic, n: int, *, spec: EvaluateSpec, groups: Sequence[Hashable] | None = None) -> float:
    """The two-sided p-value of a randomisation test that exchanges left and right on random rows, or groups of rows.

    `stacked` takes weights (draws, 2n): the left system's rows, then the right system's. Exact at any n; with k rows or
    groups it cannot fall below 2^(1-k), so a handful of rows proves nothing.
    """
    ones, zeros = np.ones((1, n)), np.zeros((1, n))
    observed = abs(_gap(stacked, ones, zeros))
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in (range(n) if groups is None else groups)])
    generator = np.random.default_rng([spec.seed, 1])
    at_once, reached = max(1, _CELLS // (2 * n)), 0
    for start in range(0, spec.resamples, at_once):
        draws = min(at_once, spec.resamples - start)
        swapped = generator.integers(0, 2, size=(draws, len(numbers))).astype(np.float64)[:, index]
        reached += int(np.sum(np.abs(_gap(stacked, 1 - swapped, swapped)) >= observed - 1e-12))
    return (reached + 1) / (spec.resamples + 1)


def _gap(stacked: Statistic, left: Floats, right: Floats) -> NDArray[np.float64]:
    return stacked(np.concatenate([left, right], axis=1)) - stacked(np.concatenate([right, left], axis=1))


def _difference(left: Statistic, right: Statistic, *, n: int, spec: EvaluateSpec, groups: Sequence[Hashable] | None) -> Estimate:
    return bootstrap(lambda weights: left(weights) - right(weights), n, spec=spec, groups=groups)


def _widen_if_flat(difference: Estimate, paired: Paired) -> Estimate:
    """Bonett and Price's (2012) interval if all rows have the same difference and the bootstrap has no width.

    p = (discordant one way + 1)/(n + 2), q the other way:  (p - q) ± z sqrt((p + q - (p - q)²)/(n + 2))
    """
    if difference.low < difference.high:
        return difference
    p, q = ((count + 1) / (paired.n + 2) for count in (paired.only_left, paired.only_right))
    reach = float(special.ndtri(0.5 + difference.confidence / 2)) * math.sqrt((p + q - (p - q) ** 2) / (paired.n + 2))
    low, high = max(-1.0, p - q - reach), min(1.0, p - q + reach)
    value = difference.value
    return Estimate(value, min(low, value), max(high, value), paired.n, "Bonett-Price", difference.confidence)


def paired_verdict(difference: Estimate, p_value: float, *, higher_is_better: bool) -> Verdict:
    """The verdict on the left system; "no difference shown" unless interval and test agree."""
    if not difference.excludes_zero or p_value >= 1 - difference.confidence:
        return "no difference shown"
    return "better" if (difference.value > 0) == higher_is_better else "worse"


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
    verdict = paired_verdict(difference, p_value, higher_is_better=False)
    return Comparison(left[0].system, right[0].system, "loss", difference, p_value, method, False, verdict)


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
