"""Logistic regression with an L2 penalty, by L-BFGS: the simple classifier that a model has to beat.

Minimum, weights and stopping rule are those of scikit-learn's LogisticRegression (solver lbfgs, tolerance 1e-4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp, softmax

from lorakeet.evaluate.intervals import Floats

INVERSE_PENALTY = 10.0  # C: the penalty on the weights, divided by it
ITERATIONS = 2000
TOLERANCE = 1e-4  # of the largest derivative


@dataclass(frozen=True, eq=False)
class Regression:
    """Fitted weights. Two classes have one row of weights, which speaks for the second class; more have one row each."""

    classes: tuple[str, ...]  # sorted
    weights: Floats  # (classes, features), or (1, features) of two classes
    intercepts: Floats  # of each row of weights
    converged: bool

    def scores(self, features: Any) -> Floats:
        """Logits (rows, classes), of two classes (rows, 2) with zeros for the first."""
        return _logits(features, self.weights, self.intercepts)

    def probabilities(self, features: Any) -> Floats:
        """(rows, classes), in the order of `classes`."""
        return np.asarray(softmax(self.scores(features), axis=1), dtype=np.float64)

    def answers(self, features: Any) -> list[str]:
        """The likeliest class of each row."""
        return [self.classes[index] for index in self.scores(features).argmax(axis=1)]


def regression(features: Any, labels: Sequence[str], *, intercept: bool = True, balanced: bool = True) -> Regression:
    """Fits rows of features (dense or sparse) to their labels, of which there are at least two different ones.

    With `balanced` each class weighs the same, however many rows it has; `intercept` adds a constant that is not penalised.
    """
    from scipy import optimize  # only here: it takes memory of its own

    classes, truth, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    weighed = len(truth) / (len(classes) * counts) if balanced else np.ones(len(classes))
    shares = weighed[truth] / weighed[truth].sum()
    penalty = 1 / (INVERSE_PENALTY * weighed[truth].sum())
    rows, columns = 1 if len(classes) == 2 else len(classes), features.shape[1]
    transposed, every = features.T, np.arange(len(truth))

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights, constants = _parts(flat, rows, columns)
        logits = _logits(features, weights, constants)
        value = shares @ (logsumexp(logits, axis=1) - logits[every, truth]) + 0.5 * penalty * (weights**2).sum()
        slopes = softmax(logits, axis=1)
        slopes[every, truth] -= 1
        slopes = (slopes * shares[:, None])[:, -rows:]
        steepness = (transposed @ slopes).T + penalty * weights
        return float(value), np.concatenate([steepness.ravel(), slopes.sum(axis=0) if intercept else np.zeros(rows)])

    options = {"maxiter": ITERATIONS, "maxls": 50, "gtol": TOLERANCE, "ftol": 64 * np.finfo(float).eps}
    found = optimize.minimize(loss, np.zeros(rows * (columns + 1)), method="L-BFGS-B", jac=True, options=options)
    weights, constants = _parts(found.x, rows, columns)
    return Regression(tuple(map(str, classes)), weights, constants, converged=found.status == 0)


def _parts(flat: Floats, rows: int, columns: int) -> tuple[Floats, Floats]:
    return flat[: rows * columns].reshape(rows, columns), flat[rows * columns :]


def _logits(features: Any, weights: Floats, constants: Floats) -> Floats:
    logits = np.asarray(features @ weights.T) + constants
    return np.concatenate([np.zeros_like(logits), logits], axis=1) if len(weights) == 1 else logits
