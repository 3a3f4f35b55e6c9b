"""Baselines: the majority class, and TF-IDF with logistic regression."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from lorakeet.errors import DataError, Problems
from lorakeet.evaluate.answers import Answers, answers_from_probabilities
from lorakeet.evaluate.intervals import Floats

MAJORITY = "majority class"
TFIDF = "TF-IDF + logistic regression"


def majority_class(
    train_labels: Sequence[str], truth: Sequence[str], *, labels: Sequence[str], groups: Sequence[Hashable] | None = None
) -> Answers:
    """Answers every row with the label frequencies of the training rows, (count + 1) / (rows + labels)."""
    _check(train_labels, truth, labels)
    frequencies = _frequencies(train_labels, labels)
    note = f"always answers '{labels[int(frequencies.argmax())]}'"
    table = np.tile(frequencies, (len(truth), 1))
    return answers_from_probabilities(MAJORITY, table, labels=labels, truth=_index(truth, labels), groups=groups, note=note)


def tfidf_logistic(
    train_texts: Sequence[str],
    train_labels: Sequence[str],
    *,
    texts: Sequence[str],
    truth: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[Hashable] | None = None,
) -> Answers:
    """Answers by TF-IDF (word 1-2-grams in at least 2 rows, sublinear) and logistic regression (C = 10, balanced classes).

    Needs two labels among the training rows. If no word occurs in two rows, all words are used; without words, the answers are
    the majority's; `note` says either. A label of no training row gets 1 / (rows + 1).
    """
    _check(train_labels, truth, labels)
    present = set(train_labels)
    if len(present) < 2:
        raise DataError(f"{TFIDF} needs 2 labels in the training rows; all {len(train_labels)} are '{train_labels[0]}'.")
    if len(train_texts) != len(train_labels) or len(texts) != len(truth):
        counts = f"{len(train_texts)} and {len(train_labels)} to train on, {len(texts)} and {len(truth)} to answer"
        raise DataError(f"Texts and labels differ in number: {counts}; expected one label for each text.")
    unseen = [label for label in labels if label not in present]
    note = f"never saw {', '.join(map(repr, unseen))}; " if unseen else ""
    probabilities, said = _fit_and_answer(train_texts, train_labels, texts, labels)
    if probabilities is None:
        probabilities = np.tile(_frequencies(train_labels, labels), (len(texts), 1))
    return answers_from_probabilities(
        TFIDF, probabilities, labels=labels, truth=_index(truth, labels), groups=groups, note=(note + said).rstrip("; ")
    )


def _fit_and_answer(
    train_texts: Sequence[str], train_labels: Sequence[str], texts: Sequence[str], labels: Sequence[str]
) -> tuple[Floats | None, str]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    analyse = words.build_analyzer()
    occurs = Counter(term for text in train_texts for term in set(analyse(text)))
    if not occurs:
        return None, "the training rows have no words, so it answers like the majority class"
    said = ""
    if max(occurs.values()) < 2:
        words.set_params(min_df=1)
        said = "no word occurs in two training rows, so words of a single row are used; "
    model = LogisticRegression(C=10, class_weight="balanced", max_iter=2000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(words.fit_transform(train_texts), list(train_labels))
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        said += "the logistic regression had not converged after 2000 iterations; "
    known = np.asarray(model.predict_proba(words.transform(texts)), dtype=np.float64)
    columns = {label: index for index, label in enumerate(model.classes_)}
    floor = 1 / (len(train_labels) + 1)
    table = np.stack([known[:, columns[label]] if label in columns else np.full(len(texts), floor) for label in labels], axis=1)
    return table / table.sum(axis=1, keepdims=True), said


def _frequencies(train_labels: Sequence[str], labels: Sequence[str]) -> Floats:
    counts = Counter(train_labels)
    return np.array([counts[label] + 1 for label in labels], dtype=np.float64) / (len(train_labels) + len(labels))


def _index(truth: Sequence[str], labels: Sequence[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    position = {label: index for index, label in enumerate(labels)}
    return np.array([position[label] for label in truth], dtype=np.int64)


def _check(train_labels: Sequence[str], truth: Sequence[str], labels: Sequence[str]) -> None:
    problems = Problems("The baselines cannot be measured", kind=DataError)
    if len(labels) < 2:
        problems.add(f"Classification needs at least 2 labels; found {len(labels)}: {', '.join(labels) or 'none'}.")
    if not train_labels:
        problems.add("There are 0 training rows; expected at least 1.")
    if not truth:
        problems.add("There are 0 rows to answer; expected at least 1.")
    for name, given in (("training", train_labels), ("held-out", truth)):
        unknown = sorted(set(given) - set(labels))
        if unknown:
            known = ", ".join(map(repr, labels))
            problems.add(f"The {name} rows have the labels {', '.join(map(repr, unknown))}; expected only {known}.")
    problems.raise_if_any()
