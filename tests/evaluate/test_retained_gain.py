"""The share of a gain that survives: 1, 0 and between, with an interval, and what has no gain is refused."""

from __future__ import annotations

import numpy as np
import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import Answers
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.retained_gain import per_row, surviving_share
from lorakeet.evaluate.spec import EvaluateSpec

SPEC = EvaluateSpec(resamples=500)


def losses(system: str, factor: float) -> RowLosses:
    return RowLosses(system, factor * np.random.default_rng(0).uniform(1, 3, 40), np.full(40, 7))


def test_the_share_is_of_the_fall_in_loss() -> None:
    base, adapter = losses("base", 2.0), losses("adapter", 1.0)
    assert surviving_share(base, adapter, adapter, SPEC).value == 1
    assert surviving_share(base, adapter, base, SPEC).value == 0
    share = surviving_share(base, adapter, losses("packed", 1.25), SPEC)
    assert share.value == pytest.approx(0.75) and share.n == 40
    assert surviving_share(base, adapter, losses("worse", 2.5), SPEC).value == pytest.approx(-0.5)


def test_its_interval_is_wider_the_more_rows_differ() -> None:
    base, adapter = losses("base", 2.0), losses("adapter", 1.0)
    noisy = RowLosses("packed", adapter.losses + np.random.default_rng(1).normal(0.3, 1, 40), adapter.tokens)
    share = surviving_share(base, adapter, noisy, SPEC)
    assert share.low < share.value < share.high and share.high - share.low > 0.1


def test_rows_with_labels_count_by_the_log_loss() -> None:
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6]])
    answers = Answers("packed", ("a", "b"), np.array([0, 0]), np.log(probabilities))
    np.testing.assert_allclose(per_row(answers), -np.log([0.9, 0.4]))


def test_what_cannot_be_compared_is_refused() -> None:
    base = losses("base", 1.0)
    with pytest.raises(DataError, match="gained nothing over its base on these 40 held-out rows"):
        surviving_share(base, losses("adapter", 1.5), base, SPEC)
    short = RowLosses("packed", base.losses[:9], base.tokens[:9])
    with pytest.raises(DataError, match="40, 40, 9 rows"):
        surviving_share(base, losses("adapter", 0.5), short, SPEC)
