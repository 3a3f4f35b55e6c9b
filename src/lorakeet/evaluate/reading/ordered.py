"""Agreement of numbers and of ordered labels as functions of row weights: rank correlation and quadratic kappa."""

from __future__ import annotations

import numpy as np

from lorakeet.evaluate.intervals import Floats, Statistic


def quadratic_kappa(given: Floats, true: Floats) -> Statistic:
    """Cohen's kappa with quadratic weights (1968) of places on a scale: 1 − E(x − y)² / E(x − y')² with y' of another row.

    1 is full agreement; 0 is that of chance, and of always the same answer. 0 where all rows have one and the same place.
    """
    gap = (given - true) ** 2

    def statistic(weights: Floats) -> Floats:
        total = weights.sum(axis=1)
        means = [weights @ side / total for side in (given, true)]
        squares = [weights @ side**2 / total for side in (given, true)]
        by_chance = squares[0] + squares[1] - 2 * means[0] * means[1]
        some = by_chance > 1e-12
        return np.where(some, 1 - (weights @ gap / total) / np.where(some, by_chance, 1), 0.0)

    return statistic


def rank_correlation(given: Floats, true: Floats) -> Statistic:
    """Spearman's correlation: Pearson's of the ranks, the middle one for ties; 0 where one side has a single value."""
    sides = _ranks(given), _ranks(true)

    def statistic(weights: Floats) -> Floats:
        total = weights.sum(axis=1)
        left, right = (side(weights) - total[:, None] / 2 for side in sides)  # the mean of middle ranks is half of all
        products = [(weights * one * other).sum(axis=1) for one, other in ((left, right), (left, left), (right, right))]
        spread = np.sqrt(products[1] * products[2])
        some = spread > 1e-9
        return np.where(some, products[0] / np.where(some, spread, 1), 0.0)

    return statistic


def _ranks(values: Floats) -> Statistic:
    """The middle ranks (draws, n) of `values` in resamples."""
    order = np.argsort(values, kind="stable")
    _, starts, index = np.unique(values[order], return_index=True, return_inverse=True)
    place = np.empty(len(values), dtype=np.int64)
    place[order] = index

    def ranks(weights: Floats) -> Floats:
        counts = np.add.reduceat(weights[:, order], starts, axis=1)
        return np.asarray((np.cumsum(counts, axis=1) - counts / 2)[:, place])

    return ranks
