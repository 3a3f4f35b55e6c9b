"""Bounds are held against the end of the interval that is worse."""

from __future__ import annotations

import math

import pytest

from lorakeet.errors import ConfigError
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.requirement import Requirement, parse_requirement

FOUND = Estimate(0.80, 0.76, 0.84, 379, "Wilson")


@pytest.mark.parametrize(
    ("text", "requirement", "held"),
    [
        (">=0.76", Requirement(">=", 0.76, "low"), True),
        ("> 0.76", Requirement(">", 0.76, "low"), False),
        (">=.78 at value", Requirement(">=", 0.78, "value"), True),
        (">= 0.78 at low", Requirement(">=", 0.78, "low"), False),
        ("<=0.84", Requirement("<=", 0.84, "high"), True),
        ("<8.4e-1", Requirement("<", 0.84, "high"), False),
        ("<= 0.8 at value", Requirement("<=", 0.8, "value"), True),
    ],
)
def test_the_worse_end_decides(text: str, requirement: Requirement, held: bool) -> None:
    assert parse_requirement(text, "x") == requirement and requirement.holds(FOUND) is held


def test_what_is_no_number_meets_nothing() -> None:
    assert not any(parse_requirement(text, "x").holds(Estimate(math.nan, math.nan, math.nan, 0, "")) for text in (">=0", "<=9"))


@pytest.mark.parametrize("text", ["0.78", "=>0.78", ">=high", ">=0.78 at lo", ">=0.7 0.8"])
def test_other_texts_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--accuracy is .*; expected a bound such as '>=0.75'"):
        parse_requirement(text, "--accuracy")
