"""Rank correlation and quadratic kappa: against other libraries, on resamples too."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lorakeet.evaluate.reading.ordered import quadratic_kappa, rank_correlation

GENERATOR = np.random.default_rng(0)
TRUE = GENERATOR.integers(1, 6, 80).astype(np.float64)
GIVEN = np.clip(TRUE + GENERATOR.integers(-1, 3, 80), 1, 5)
COUNTS = GENERATOR.multinomial(80, np.full(80, 1 / 80), size=20).astype(np.float64)


def kappa_of_table(given: np.ndarray, true: np.ndarray) -> float:
    """The definition, by the table of counts."""
    table = np.histogram2d(given, true, bins=[np.arange(0.5, 6)] * 2)[0] / len(true)
    weights = np.subtract.outer(np.arange(5), np.arange(5)) ** 2
    return float(1 - (weights * table).sum() / (weights * np.outer(table.sum(1), table.sum(0))).sum())


def test_both_are_those_of_the_repeated_rows() -> None:
    for statistic, expected in ((quadratic_kappa, kappa_of_table), (rank_correlation, lambda x, y: stats.spearmanr(x, y)[0])):
        found = statistic(GIVEN, TRUE)(COUNTS)
        repeated = [np.repeat(np.arange(80), counts.astype(int)) for counts in COUNTS]
        assert found == pytest.approx([expected(GIVEN[rows], TRUE[rows]) for rows in repeated])


def test_a_constant_answer_agrees_by_chance_alone() -> None:
    same = np.full(80, 3.0)
    assert quadratic_kappa(same, TRUE)(np.ones((1, 80)))[0] == pytest.approx(0)
    assert rank_correlation(same, TRUE)(np.ones((1, 80)))[0] == 0
    assert quadratic_kappa(same, same)(np.ones((1, 80)))[0] == 0
