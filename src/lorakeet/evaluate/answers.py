"""Metrics of a classifier's answers: accuracy, macro-F1, log-loss, calibration, confusion, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lorakeet.errors import DataError, Problems
from lorakeet.evaluate.calibration import calibration_error
from lorakeet.evaluate.intervals import (
    FEWEST,
    SHARE,
    Estimate,
    Floats,
    Integers,
    Statistic,
    bootstrap,
    mean,
    numbered_units,
    posterior_weights,
    share,
)
from lorakeet.evaluate.spec import EvaluateSpec

METRICS = ("accuracy", "macro_f1", "log_loss", "calibration_error", "brier")
DOMINANT = 0.8  # share of the rows with one label from which always saying it looks like skill
FEWEST_OF_LABEL = 5  # rows of each label from which the interval of macro-F1 covers (docs/explain/held-out.md)
HIGHER_IS_BETTER = {"accuracy": True, "macro_f1": True, "log_loss": False, "calibration_error": False, "brier": False}


@dataclass(frozen=True, eq=False)
class Answers:
    """One system's label log-probabilities on labelled rows.

    `truth` (n,) and the columns of `log_probs` (n, labels) index `labels`. `groups` (n,) are ids of dependent rows: intervals
    resample groups. `note` tells the reader about the system. Ties go to the first label.
    """

    system: str
    labels: tuple[str, ...]
    truth: Integers
    log_probs: Floats
    groups: tuple[Hashable, ...] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        problems = Problems(f"The answers of '{self.system}' cannot be measured", kind=DataError)
        n, width = len(self.truth), len(self.labels)
        if width < 2:
            problems.add(f"Classification needs at least 2 labels; found {width}: {', '.join(self.labels) or 'none'}.")
        if n < 1:
            problems.add("There are 0 rows to answer; expected at least 1. Evaluate on a file that has rows.")
        if self.log_probs.shape != (n, width):
            problems.add(f"The log-probabilities have the shape {self.log_probs.shape}; expected ({n}, {width}): rows, labels.")
        elif n and bool(np.isnan(self.log_probs).any()):
            row = int(np.flatnonzero(np.isnan(self.log_probs).any(axis=1))[0])
            problems.add(f"Row {row} has NaN log-probabilities; the model's output overflowed. Evaluate in fp32 or bf16.")
        elif n and float(np.abs(np.exp(self.log_probs).sum(axis=1) - 1).max()) > 1e-4:
            row = int(np.abs(np.exp(self.log_probs).sum(axis=1) - 1).argmax())
            problems.add(f"Row {row} has probabilities that sum to {np.exp(self.log_probs[row]).sum():.4f}; expected 1.")
        if n and width and (int(self.truth.min()) < 0 or int(self.truth.max()) >= width):
            problems.add(f"A true label has the index {int(self.truth.max())}; expected 0 to {width - 1}.")
        if self.groups is not None and len(self.groups) != n:
            problems.add(f"There are {len(self.groups)} group ids for {n} rows; expected one for each row.")
        problems.raise_if_any()

    def rows(self, chosen: slice, groups: tuple[Hashable, ...] | None) -> Answers:
        """The answers to some of the rows, with these groups."""
        return replace(self, truth=self.truth[chosen], log_probs=self.log_probs[chosen], groups=groups)

    @property
    def probabilities(self) -> Floats:
        return np.asarray(np.exp(self.log_probs))

    @property
    def predicted(self) -> Integers:
        return np.asarray(self.log_probs.argmax(axis=1))

    @property
    def correct(self) -> NDArray[np.bool_]:
        return np.asarray(self.predicted == self.truth)

    @property
    def confidence(self) -> Floats:
        """Probability of the predicted label (n,)."""
        return np.asarray(self.probabilities.max(axis=1))

    @property
    def surprise(self) -> Floats:
        """-log p(true label) of each row (n,), in nats; their mean is the log-loss. A probability of 0 counts as exp(-700)."""
        return np.asarray(np.minimum(-self.log_probs[np.arange(len(self.truth)), self.truth], 700.0))


def answers_from_probabilities(
    system: str,
    probabilities: Floats,
    *,
    labels: Sequence[str],
    truth: Integers,
    groups: Sequence[Hashable] | None = None,
    note: str = "",
) -> Answers:
    """Answers from probabilities (n, labels)."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.asarray(probabilities, dtype=np.float64))
    return Answers(system, tuple(labels), np.asarray(truth), logs, None if groups is None else tuple(groups), note)


def measure(answers: Answers, spec: EvaluateSpec) -> dict[str, Estimate]:
    """The five METRICS of `answers`: accuracy (Wilson), macro-F1, log-loss, calibration error and Brier score."""
    groups = answers.groups
    errors = answers.probabilities - np.eye(len(answers.labels))[answers.truth]
    return {
        "accuracy": share(answers.correct, spec=spec, groups=groups),
        "macro_f1": _macro_f1_estimate(answers, spec),
        "log_loss": mean(answers.surprise, spec=spec, groups=groups, bounds=(0.0, np.inf)),
        "calibration_error": calibration_error(answers.confidence, answers.correct, spec=spec, groups=groups),
        "brier": mean(np.sum(errors**2, axis=1), spec=spec, groups=groups, bounds=(0.0, 2.0)),
    }


def dominated(answers: Answers) -> bool:
    """True if one label has so many rows that accuracy says little about the others."""
    return bool(np.bincount(answers.truth).max() >= DOMINANT * len(answers.truth))


def recall_of_rarest(answers: Answers, spec: EvaluateSpec) -> tuple[str, Estimate]:
    """The label that the fewest rows have (of those that any has), and its recall."""
    counts = np.bincount(answers.truth, minlength=len(answers.labels))
    rarest = int(np.where(counts > 0, counts, len(answers.truth) + 1).argmin())
    found = _share_among(answers, answers.truth == rarest, spec)
    assert found is not None
    return answers.labels[rarest], found


def balanced_accuracy(answers: Answers, spec: EvaluateSpec) -> Estimate:
    """The mean recall of the labels that any row has; its interval is joined from theirs (Zou and Donner 2008), which are apart.

    mean r ± sqrt(Σ (r − limit)²)/labels
    """
    found = [_share_among(answers, answers.truth == label, spec) for label in np.unique(answers.truth)]
    recalls = [one for one in found if one is not None]
    value = sum(one.value for one in recalls) / len(recalls)
    down, up = (math.hypot(*(one.value - end for one, end in zip(recalls, ends, strict=True))) / len(recalls)
                for ends in ([one.low for one in recalls], [one.high for one in recalls]))  # fmt: skip
    why = next((one.why_none for one in recalls if one.why_none), "")
    n, ends = len(answers.truth), (max(0.0, value - down), min(1.0, value + up))
    return Estimate(value, *ends, n, "joined from recalls", spec.confidence, why_none=why)


def macro_f1(answers: Answers) -> Statistic:
    """The unweighted mean of F1 = 2 hits / (true + predicted) over labels, as a function of row weights.

    A label neither true nor predicted in the (re)sample is left out of the mean; a true label never predicted counts 0.
    Both as in scikit-learn.
    """
    return _macro_f1_of(answers.truth, answers.predicted, len(answers.labels))


def macro_f1_with_unseen(answers: Answers, *, right: Sequence[int] = (1, 0)) -> Statistic:
    """The same as a function of the weights of the rows and of further ones: of each label one for each of `right`."""
    width, each = len(answers.labels), np.arange(len(answers.labels))
    truth = np.concatenate([answers.truth, *[each for _ in right]])
    predicted = np.concatenate([answers.predicted, *[each if one else (each + 1) % width for one in right]])
    return _macro_f1_of(truth, predicted, width)


def too_few_for_macro_f1(answers: Answers) -> str:
    """Why macro-F1 has no interval on these rows, in words; empty where it has one."""
    counts = np.bincount(answers.truth, minlength=len(answers.labels))
    if (units := numbered_units(len(answers.truth), answers.groups)[0]) < FEWEST and answers.groups is not None:
        return f"too few groups ({units})"
    return f"too few rows of label {answers.labels[counts.argmin()]!r} ({counts.min()})" if counts.min() < FEWEST_OF_LABEL else ""


def _macro_f1_estimate(answers: Answers, spec: EvaluateSpec) -> Estimate:
    """Macro-F1 with the hull of the bootstrap's interval and of that of the Bayesian one, for which a mistake may be unseen."""
    n, groups = len(answers.truth), answers.groups
    found = bootstrap(macro_f1(answers), n, spec=spec, groups=groups)
    if why := too_few_for_macro_f1(answers):
        return found.without(why, SHARE)
    statistic = macro_f1_with_unseen(answers)
    drawn = [statistic(weights) for weights in posterior_weights(n, 2 * len(answers.labels), spec=spec, groups=groups)]
    low, high = np.quantile(np.concatenate(drawn), ((1 - spec.confidence) / 2, (1 + spec.confidence) / 2))
    method = found.method.replace("bootstrap", "and Bayesian bootstrap")
    return replace(found, low=min(found.low, float(low)), high=max(found.high, float(high)), method=method)


def _macro_f1_of(truth: Integers, predicted: Integers, labels: int) -> Statistic:
    table = np.eye(labels)
    true, said = table[truth], table[predicted]
    hits = true * said

    def statistic(weights: Floats) -> Floats:
        occurs = weights @ (true + said)  # (draws, labels)
        present = occurs > 0
        scores = np.where(present, 2 * (weights @ hits) / np.where(present, occurs, 1), 0)
        return np.asarray(scores.sum(axis=1) / present.sum(axis=1))

    return statistic


@dataclass(frozen=True)
class LabelScore:
    """Precision and recall of one label; `precision` is None if it was never answered, `recall` if it is never true."""

    label: str
    precision: Estimate | None
    recall: Estimate | None


@dataclass(frozen=True)
class Confusion:
    """Row counts by true label (first index) and answered label (second), and each label's precision and recall."""

    system: str
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    scores: tuple[LabelScore, ...]


def confusion(answers: Answers, spec: EvaluateSpec) -> Confusion:
    """The confusion matrix of `answers`; label scores have Wilson's interval, or a bootstrap over groups."""
    width = len(answers.labels)
    counts = np.bincount(answers.truth * width + answers.predicted, minlength=width * width).reshape(width, width)
    scores = tuple(
        LabelScore(
            label,
            precision=_share_among(answers, answers.predicted == index, spec),
            recall=_share_among(answers, answers.truth == index, spec),
        )
        for index, label in enumerate(answers.labels)
    )
    return Confusion(answers.system, answers.labels, tuple(tuple(int(count) for count in row) for row in counts), scores)


def none_right(found: Confusion) -> str:
    """ "none of the 36 rows of 'neutral'": the labels whose every row got another answer; empty without one.

    Labels of fewer than FEWEST_OF_LABEL rows are left out.
    """
    totals = [
        (sum(row), label) for place, (label, row) in enumerate(zip(found.labels, found.counts, strict=True)) if not row[place]
    ]
    lost = sorted(((count, label) for count, label in totals if count >= FEWEST_OF_LABEL), key=lambda one: -one[0])
    named = [f"none of the {count} rows of {label[:60]!r}" for count, label in lost[:3]]
    return ", ".join(named) + (f", and none of {len(lost) - 3} more labels" if lost[3:] else "")


def _share_among(answers: Answers, chosen: NDArray[np.bool_], spec: EvaluateSpec) -> Estimate | None:
    if not chosen.any():
        return None
    groups = None if answers.groups is None else [answers.groups[row] for row in np.flatnonzero(chosen)]
    return share(answers.correct[chosen], spec=spec, groups=groups)
