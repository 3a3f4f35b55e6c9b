"""`formats.pattern_cost`: patterns that could take for ever are found before they are tried, ordinary ones are not."""

from __future__ import annotations

import math
import re
import time

import pytest

from lorakeet.formats.peft.regex_cost import MOST_STEPS, pattern_problem, steps_of


@pytest.mark.parametrize(
    ("key", "steps"),
    [
        ("q_proj", 1),
        ("a|b|c", 3),
        ("(a|b)(c|d)", 4),
        ("a?", 2),
        ("a?b?", 4),
        ("a{3}", 1),
        ("a{2,5}", 4),
        (".*", 128),
        (r".*\.(q|v)_proj", 256),
        (r"[+*?]\+\*", 1),
        ("(a+)+", math.inf),
        ("(a|b)*", math.inf),
        ("(a?)+", math.inf),
        ("(?#x)", math.inf),
    ],
)
def test_ways_multiply_in_a_row_add_up_as_alternatives_and_have_no_end_where_repetitions_nest(key: str, steps: float) -> None:
    assert steps_of(key) == steps


def test_what_is_let_through_is_quick_on_a_long_path() -> None:
    path = "model." + "layers.0." * 20 + "q_proj!"
    for key in (".*a.*b.*c", r"(?:model\.)?.*\.(?:q|k|v)_proj", ".*.*.*x"):
        assert pattern_problem(key, key) == "" and steps_of(key) <= MOST_STEPS
        began = time.perf_counter()
        re.fullmatch(key, path)
        assert time.perf_counter() - began < 5


def test_the_problem_is_named() -> None:
    assert "may take for ever" in pattern_problem("(a+)+$", "(a+)+$")
    assert "1,001 characters long" in pattern_problem("a" * 1001, "a")
    assert "is not a regular expression" in pattern_problem("(", "(")
    assert "is not a regular expression" in pattern_problem("a", "(a"), "as it is used"
    assert pattern_problem(".*.*.*.*.*b", "x") != "" == pattern_problem(".*.*.*.*.*b", "x", most_steps=math.inf)
