from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import METRICS, Answers, answers_from_probabilities, confusion, macro_f1, measure
from lorakeet.evaluate.spec import EvaluateSpec

QUICK = EvaluateSpec(resamples=400)
LABELS = ("no", "maybe", "yes")


def some_answers(n: int = 200, *, seed: int = 0, groups: tuple[int, ...] | None = None) -> Answers:
    generator = np.random.default_rng(seed)
    truth = generator.choice(3, p=[0.3, 0.1, 0.6], size=n)
    scores = generator.normal(size=(n, 3))
    scores[np.arange(n), truth] += 1
    table = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return answers_from_probabilities("system", table, labels=LABELS, truth=truth, groups=groups)


def test_values_equal_scikit_learn() -> None:
    answers = some_answers()
    found = measure(answers, QUICK)
    assert tuple(found) == METRICS
    assert found["accuracy"].value == pytest.approx(metrics.accuracy_score(answers.truth, answers.predicted))
    assert found["macro_f1"].value == pytest.approx(metrics.f1_score(answers.truth, answers.predicted, average="macro"))
    assert found["log_loss"].value == pytest.approx(metrics.log_loss(answers.truth, answers.probabilities))
    squared = np.sum((answers.probabilities - np.eye(3)[answers.truth]) ** 2, axis=1)
    assert found["brier"].value == pytest.approx(squared.mean())
    assert all(estimate.low <= estimate.value <= estimate.high and estimate.n == 200 for estimate in found.values())


def test_macro_f1_weights_equal_repeated_rows() -> None:
    answers = some_answers(40)
    weights = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=20).astype(float)
    for row, value in zip(weights, macro_f1(answers)(weights), strict=True):
        index = np.repeat(np.arange(40), row.astype(int))
        assert value == pytest.approx(
            metrics.f1_score(answers.truth[index], answers.predicted[index], average="macro", zero_division=0)
        )


def test_absent_labels_are_left_out_and_unanswered_ones_count_zero() -> None:
    table = np.array([[0.8, 0.1, 0.1], [0.7, 0.1, 0.2]])
    absent = answers_from_probabilities("system", table, labels=LABELS, truth=np.array([0, 0]))
    assert macro_f1(absent)(np.ones((1, 2)))[0] == 1.0
    never = answers_from_probabilities("system", table, labels=LABELS, truth=np.array([0, 2]))
    assert macro_f1(never)(np.ones((1, 2)))[0] == pytest.approx((2 / 3 + 0) / 2)


def test_confusion_counts_precision_and_recall() -> None:
    answers = some_answers()
    found = confusion(answers, QUICK)
    assert np.array_equal(found.counts, metrics.confusion_matrix(answers.truth, answers.predicted))
    recall = metrics.recall_score(answers.truth, answers.predicted, average=None)
    assert [score.recall.value for score in found.scores if score.recall] == pytest.approx(list(recall))


def test_a_label_that_never_occurs_has_no_precision_and_no_recall() -> None:
    answers = answers_from_probabilities("system", np.array([[0.9, 0.0, 0.1]]), labels=LABELS, truth=np.array([0]))
    assert confusion(answers, QUICK).scores[1].precision is None
    assert confusion(answers, QUICK).scores[1].recall is None


def test_groups_reach_every_interval() -> None:
    found = measure(some_answers(60, groups=tuple(row // 3 for row in range(60))), QUICK)
    assert all("over 20 groups" in estimate.method for estimate in found.values())


def test_a_certain_mistake_counts_as_the_least_probability_there_is() -> None:
    table = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    answers = answers_from_probabilities("system", table, labels=LABELS, truth=np.array([2, 0]))
    assert measure(answers, QUICK)["log_loss"].value == 350.0


@pytest.mark.parametrize(
    ("table", "labels", "truth", "words"),
    [
        (np.ones((2, 1)), ("no",), [0, 0], "at least 2 labels; found 1: no"),
        (np.zeros((0, 3)), LABELS, [], "0 rows"),
        (np.full((2, 2), 0.5), LABELS, [0, 1], r"shape \(2, 2\)"),
        (np.full((2, 3), np.nan), LABELS, [0, 1], "Row 0 has NaN"),
        (np.full((2, 3), 0.5), LABELS, [0, 1], "sum to 1.5000"),
        (np.full((1, 3), 1 / 3), LABELS, [3], "index 3; expected 0 to 2"),
    ],
)
def test_bad_tables_are_refused(table: np.ndarray, labels: tuple[str, ...], truth: list[int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        answers_from_probabilities("system", table, labels=labels, truth=np.array(truth, dtype=np.int64))
