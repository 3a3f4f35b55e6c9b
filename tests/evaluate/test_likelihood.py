from __future__ import annotations

import math

import numpy as np
import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.likelihood import RowLosses, label_log_probs, measure_losses
from lorakeet.evaluate.spec import EvaluateSpec

QUICK = EvaluateSpec(resamples=400)


def test_softmax_over_candidates_survives_tiny_likelihoods() -> None:
    found = label_log_probs(np.array([[-2000.0, -2000.0 + math.log(3)], [-np.inf, -4.0]]))
    assert np.exp(found) == pytest.approx(np.array([[0.25, 0.75], [0.0, 1.0]]))


@pytest.mark.parametrize("row", [[np.nan, -1.0], [-np.inf, -np.inf]])
def test_rows_without_a_likelihood_are_named(row: list[float]) -> None:
    with pytest.raises(DataError, match="Row 1 has the candidate scores"):
        label_log_probs(np.array([[-1.0, -2.0], row]))
    with pytest.raises(DataError, match="expected \\(rows, labels\\)"):
        label_log_probs(np.array(row))


def test_loss_is_token_weighted_and_perplexity_its_exponential() -> None:
    found = measure_losses(RowLosses("toy", np.array([2.0, 30.0, 8.0]), np.array([1, 10, 4])), QUICK)
    assert found["loss"].value == pytest.approx(40 / 15)
    assert found["perplexity"].low == pytest.approx(math.exp(found["loss"].low))
    assert found["loss"].n == 3 and found["loss"].seed == 0
    huge = measure_losses(RowLosses("toy", np.array([1e6]), np.array([1])), QUICK)
    assert huge["perplexity"].value == math.inf


@pytest.mark.parametrize(
    ("losses", "tokens", "words"),
    [
        ([1.0], [0], "Row 0 has 0 supervised tokens"),
        ([1.0, np.inf], [1, 1], "Row 1 has the loss inf"),
        ([1.0, 2.0], [1], "2 losses and 1 token counts"),
        ([], [], "0 losses"),
    ],
)
def test_bad_losses_are_refused(losses: list[float], tokens: list[int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        RowLosses("toy", np.array(losses), np.array(tokens, dtype=np.int64))
