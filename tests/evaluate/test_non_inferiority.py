"""A margin: what is as good, what is worse however little, and how many rows would show it."""

from __future__ import annotations

import math

import pytest

from lorakeet.evaluate.compare import Comparison
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.non_inferiority import Margin, fewest_rows, least_margin, worse_by
from lorakeet.evaluate.paired import Paired, score_difference

MARGIN = Margin(loss=0.003, metric=0.02)


def found(metric: str, value: float, low: float, high: float, n: int = 40) -> Comparison:
    higher = metric == "accuracy"
    return Comparison("cut", "uncut", metric, Estimate(value, low, high, n, "made up"), 0.5, "made up", higher, "worse")


def test_a_whole_interval_within_the_margin_is_as_good() -> None:
    assert MARGIN.why_not([found("loss", 0.001, -0.001, 0.003), found("accuracy", 0.0, -0.02, 0.02)]) == ""


def test_an_interval_that_leaves_the_margin_is_not() -> None:
    assert MARGIN.why_not([found("loss", 0.001, -0.001, 0.0031)]) == "loss may be 0.0031 worse, 0.0030 is allowed"
    assert MARGIN.why_not([found("accuracy", 0.0, -0.03, 0.03)]) == "accuracy may be 3.00 points worse, 2.00 points is allowed"


@pytest.mark.parametrize("wide", [0.01, 10.0])
def test_what_is_shown_to_be_worse_is_never_as_good_however_wide_the_margin(wide: float) -> None:
    """The first users' case: loss +0.0496 [+0.0351, +0.0659] within 1 % of the gain over a base of 8.69."""
    margin = Margin(loss=wide, metric=wide)
    assert margin.why_not([found("log_loss", 0.0496, 0.0351, 0.0659)]) == "log-loss is worse"
    assert margin.why_not([found("accuracy", -0.047, -0.08, -0.01)]) == "accuracy is worse"


def test_rounding_is_no_difference() -> None:
    assert Margin(loss=0.0, metric=0.0).why_not([found("loss", 2e-6, 1e-6, 3e-6), found("accuracy", 0.0, 0.0, 0.0)]) == ""


def test_a_handful_of_rows_shows_nothing() -> None:
    assert MARGIN.why_not([found("loss", -0.1, -0.1, -0.1, n=1)]) == "1 rows are too few to show anything"


def test_numbers_that_are_not_finite_are_not_as_good() -> None:
    assert MARGIN.why_not([found("loss", math.nan, math.nan, math.nan)])


def test_the_rows_that_would_show_it() -> None:
    """With 40 rows the interval reaches 0.011 above a loss of 0.001. Where 0.003 is allowed, 30.25 times as many have one that
    ends there, and 61.8 times as many one that ends below it with a probability of 80 %.
    """
    assert MARGIN.rows_needed([found("loss", 0.001, -0.009, 0.012)]) == 2473
    assert MARGIN.rows_needed([found("loss", 0.004, -0.009, 0.012)]) is None, "by its own estimate it is too much worse"
    assert MARGIN.rows_needed([found("loss", 0.002, 0.001, 0.012)]) is None, "it is worse"
    assert MARGIN.rows_needed([found("loss", 0.0, -0.001, 0.001)]) is None, "it is as good already"
    assert (MARGIN.rows_needed([found("accuracy", -0.01, -0.05, 0.03), found("loss", 0.0, -0.001, 0.001)]) or 0) > 40


def test_worse_by_turns_with_the_metric() -> None:
    assert worse_by(found("loss", 0.1, 0.0, 0.2)) == (0.0, 0.2) and worse_by(found("accuracy", 0.1, 0.0, 0.2)) == (-0.2, 0.0)


@pytest.mark.parametrize("margin", [0.3, 0.1, 0.02])
def test_so_many_rows_at_least_show_equal_answers_to_be_as_good(margin: float) -> None:
    needed = fewest_rows(margin, 0.95)
    assert needed is not None and fewest_rows(0.0, 0.95) is None
    for rows, enough in ((needed, True), (needed - 1, False)):
        low = score_difference(Paired(rows, 0, 0, 0), 0.95)[0].low
        assert (-low <= margin) == enough
        assert (least_margin(rows, 0.95) <= margin) == enough
