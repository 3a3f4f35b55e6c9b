"""Suspect labels: rows whose label two independent systems both contradict with confidence (confident learning)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import Answers

SURE = 0.5  # probability that each system must give to the other label: more than to all others together


@dataclass(frozen=True)
class SuspectLabel:
    """A row whose `label` two systems contradict with the same other one, and the probabilities that they give to it.

    A report adds the row's text and source.
    """

    row: int
    label: str
    suggested: str
    probabilities: tuple[float, float]
    text: str = ""
    source: str = ""


def suspect_labels(left: Answers, right: Answers) -> tuple[SuspectLabel, ...]:
    """The suspects among rows that neither system was trained on, the most confident first.

    Both answer the same other label, and each gives it more than half of the probability: a system that is never sure is no
    witness. Together they give it at least the mean probability that they give it on rows which have it: the threshold of
    confident learning (Northcutt et al. 2021, https://arxiv.org/abs/1911.00068). Raises DataError for other rows.
    """
    if left.labels != right.labels or not np.array_equal(left.truth, right.truth):
        raise DataError(f"'{left.system}' and '{right.system}' did not answer the same rows; answer the same file with both.")
    both, truth, said = (left.probabilities + right.probabilities) / 2, left.truth, left.predicted
    present = [label for label in range(len(left.labels)) if (truth == label).any()]
    usual = np.full(len(left.labels), np.inf)
    usual[present] = [both[truth == label, label].mean() for label in present]
    each = np.arange(len(truth)), said
    confident = both[each] >= usual[said]
    confident &= np.minimum(left.probabilities[each], right.probabilities[each]) > SURE
    rows = np.flatnonzero(confident & (said == right.predicted) & (said != truth))
    found = [
        SuspectLabel(
            int(row), left.labels[truth[row]], left.labels[said[row]],
            (float(left.probabilities[row, said[row]]), float(right.probabilities[row, said[row]])),
        )
        for row in rows
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda one: -min(one.probabilities)))
