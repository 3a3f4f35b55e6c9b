"""Calibration by temperature and bias: what it mends, what few rows cannot change, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import Answers
from lorakeet.evaluate.temperature import calibrated

LABELS = ("a", "b", "c")


def made(rows: int, *, seed: int, bias: tuple[float, ...] = (0.0, 0.0, 0.0), sharp: float = 1.0) -> Answers:
    """Answers whose own probabilities are right, given away with a bias and a temperature."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(rows, 3)) * 2
    honest = np.exp(log_softmax(scores, axis=1))
    truth = np.array([generator.choice(3, p=row) for row in honest])
    return Answers("base", LABELS, truth, log_softmax(sharp * (scores + np.array(bias)), axis=1))


def log_loss(answers: Answers) -> float:
    return float(answers.surprise.mean())


def test_a_bias_and_a_temperature_are_undone() -> None:
    away = {"bias": (3.0, 0.0, -2.0), "sharp": 2.5}
    test, honest = made(2000, seed=1, **away), made(2000, seed=1)  # type: ignore[arg-type]
    found = calibrated(test, made(400, seed=2, **away))  # type: ignore[arg-type]
    assert log_loss(test) > 2 * log_loss(honest) and log_loss(found) < 1.06 * log_loss(honest)
    assert found.correct.mean() > test.correct.mean() + 0.1


def test_honest_answers_stay_nearly_as_they_are() -> None:
    test = made(500, seed=3)
    assert np.abs(calibrated(test, made(400, seed=4)).probabilities - test.probabilities).max() < 0.15


def test_one_row_changes_little_even_if_it_was_impossible() -> None:
    test = made(50, seed=5)
    known = Answers("base", LABELS, np.array([2]), np.log(np.array([[0.5, 0.5, 1e-300]]) / 1.0))
    found = calibrated(test, known)
    assert np.isfinite(found.log_probs).all() and np.abs(found.log_probs.mean() - test.log_probs.mean()) < 2


def test_other_labels_are_refused() -> None:
    with pytest.raises(DataError, match="the labels"):
        calibrated(made(5, seed=0), Answers("base", ("x", "y"), np.array([0]), np.log(np.array([[0.5, 0.5]]))))
