"""Calibrates label probabilities by a temperature and a bias for each label, fitted on other labelled rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.special import log_softmax

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import Answers
from lorakeet.evaluate.intervals import Floats

PRIOR_ROWS = 4.0  # the fit is drawn to "no change" as strongly as so many rows would


def calibrated(answers: Answers, known: Answers) -> Answers:
    """`answers` with  log_softmax(t · log p + b),  where t and b (labels,) fit the rows of `known`.

    Vector scaling (Guo et al. 2017, https://arxiv.org/abs/1706.04599) with one t.

    A quadratic penalty draws log t and b to 0, so that a few rows change little. Raises DataError for other labels.
    """
    from scipy import optimize  # only here: it takes memory of its own

    if answers.labels != known.labels:
        raise DataError(f"The rows to calibrate on have the labels {known.labels}; expected {answers.labels}.")
    logs, width = np.maximum(known.log_probs, -700.0), len(known.labels)
    truth = np.eye(width)[known.truth]

    def loss_at(parameters: Floats) -> tuple[float, Floats]:
        scale = float(np.exp(parameters[0]))
        found = log_softmax(scale * logs + parameters[1:], axis=1)
        error = np.exp(found) - truth  # of the loss by the scores
        loss = -float((truth * found).sum()) + PRIOR_ROWS / 2 * float(parameters @ parameters)
        slope = np.concatenate([[scale * float((error * logs).sum())], error.sum(axis=0)])
        return loss, slope + PRIOR_ROWS * parameters

    bounds = [(-5.0, 3.0), *[(None, None)] * width]
    fitted = optimize.minimize(loss_at, np.zeros(1 + width), jac=True, method="L-BFGS-B", bounds=bounds)
    scale, bias = float(np.exp(fitted.x[0])), fitted.x[1:]
    return replace(answers, log_probs=np.asarray(log_softmax(scale * np.maximum(answers.log_probs, -700.0) + bias, axis=1)))
