"""Which answer a system prefers: shares, equal lengths, paired comparisons, and baselines that see no prompt."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.kinds.preference.measure import (
    PREFERRED,
    PREFERRED_ALIKE,
    PairPreferences,
    compare_preferences,
    equal_lengths,
    length_of_answers,
    mean_change,
    measure_preferences,
    tfidf_difference,
)

SPEC = EvaluateSpec(resamples=200)
ALL = np.ones(40, bool)


def test_a_score_of_zero_counts_half() -> None:
    assert PairPreferences("adapter", np.array([2.0, -1.0, 0.0])).right.tolist() == [1.0, 0.0, 0.5]


def test_shares_of_all_and_of_answers_of_equal_length() -> None:
    pairs = PairPreferences("adapter", np.where(np.arange(40) < 30, 1.0, -1.0))
    found = measure_preferences(pairs, np.arange(40) < 20, SPEC)
    assert found[PREFERRED].value == 0.75 and found[PREFERRED_ALIKE].value == 1.0
    assert PREFERRED_ALIKE not in measure_preferences(pairs, ALL, SPEC)


def test_lengths_within_a_tenth_are_equal() -> None:
    assert equal_lengths(np.array([10.0, 10.0, 20.0]), np.array([9.0, 8.0, 22.0])).tolist() == [True, False, True]


def test_the_better_system_is_called_better() -> None:
    better, worse = (PairPreferences(name, np.where(np.arange(40) < right, 1.0, -1.0)) for name, right in (("a", 38), ("b", 20)))
    (found,) = compare_preferences(better, worse, ALL, SPEC)
    assert found.verdict == "better" and found.difference.value == pytest.approx(0.45)
    assert len(compare_preferences(better, worse, np.arange(40) < 20, SPEC)) == 2


def test_the_length_that_training_pairs_prefer() -> None:
    pairs = [("aaa", "a"), ("a", "aaa"), ("a", "b")]
    longer, shorter, alike, none = (length_of_answers(train, pairs, None) for train in (
        [("aa", "b"), ("aa", "c"), ("a", "bb"), ("a", "b")], [("a", "bb"), ("a", "b")], [("a", "b")], [],
    ))  # fmt: skip
    assert shorter.system == "shorter answer" and {longer.system, alike.system, none.system} == {"longer answer"}
    assert longer.scores.tolist() == [2.0, -2.0, 0.0] and shorter.scores.tolist() == [-2.0, 2.0, 0.0]
    assert longer.note == "always prefers the answer with more characters, as in 2 of 4 training pairs"
    assert shorter.note == "always prefers the answer with fewer characters, as in 1 of 2 training pairs"
    assert none.note == "always prefers the answer with more characters"


def test_words_that_give_an_answer_away_are_found_without_the_prompt() -> None:
    chance = random.Random(0)

    def some(count: int) -> list[tuple[str, str]]:
        words = [f"word{chance.randrange(20)}" for _ in range(count)]
        return [(f"sure, {word}", f"no, {word}") for word in words]

    found = tfidf_difference(some(60), some(20), None)
    assert found is not None and (found.scores > 0).all()
    assert tfidf_difference(some(5), some(5), None) is None


def test_answers_that_differ_by_the_prompt_alone_are_not_told_apart() -> None:
    chance = random.Random(1)

    def some(count: int) -> list[tuple[str, str]]:
        return [tuple(chance.sample(["left", "right"], 2)) for _ in range(count)]  # type: ignore[misc]

    found = tfidf_difference(some(200), some(200), None)
    assert found is not None and 0.35 < found.right.mean() < 0.65


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(DataError, match="not all finite"):
        PairPreferences("adapter", np.array([1.0, float("nan")]))


def test_a_mean_change_has_its_interval() -> None:
    found = mean_change(np.linspace(-1, 1, 40), SPEC, None)
    assert found.low < 0 < found.high
