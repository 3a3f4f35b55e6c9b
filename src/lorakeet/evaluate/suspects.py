"""Suspect labels: rows whose label two independent systems both contradict with confidence (confident learning)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import Answers
from lorakeet.evaluate.reading.texts import words

SURE = 0.5  # probability that each system must give to the other label: more than to all others together
FEWEST_WITH_WORD = 3  # suspects with one suggestion from which a word that they share is no accident


@dataclass(frozen=True)
class SuspectLabel:
    """A row whose `label` two systems contradict with the same other one, and the probabilities that they give to it.

    A report adds the row's text and source. `shared` is a word that most suspects with this suggestion have and few rows that are
    answered otherwise: if both systems go by it, they are one witness, not two.
    """

    row: int
    label: str
    suggested: str
    probabilities: tuple[float, float]
    text: str = ""
    source: str = ""
    shared: str = ""


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


def with_shared_words(suspects: Sequence[SuspectLabel], texts: Sequence[str], answers: Answers) -> tuple[SuspectLabel, ...]:
    """The suspects with their texts, and with the word that those of one suggestion share, if there is one.

    At least half of them have it, and of the rows that are answered otherwise a tenth of that share at most.
    """
    if len(suspects) < FEWEST_WITH_WORD:
        return tuple(replace(one, text=texts[one.row]) for one in suspects)
    rows, shared = [frozenset(words(text)) for text in texts], dict[str, str]()
    for label in {one.suggested for one in suspects}:
        ours = [rows[one.row] for one in suspects if one.suggested == label]
        otherwise = np.flatnonzero(answers.predicted != answers.labels.index(label))
        others = Counter(word for row in otherwise for word in rows[row])
        most = [
            (count, word)
            for word, count in Counter(word for row in ours for word in row).items()
            if count >= len(ours) / 2 and others[word] / max(1, len(otherwise)) <= 0.1 * count / len(ours)
        ]
        if len(ours) >= FEWEST_WITH_WORD and most:
            shared[label] = max(most)[1]
    named = [shared.get(one.suggested, "") for one in suspects]
    return tuple(
        replace(one, text=texts[one.row], shared=word if word and word in rows[one.row] else "")
        for one, word in zip(suspects, named, strict=True)
    )
