"""Suspect labels: planted wrong ones are found, and rows that one system alone doubts are not."""

from __future__ import annotations

import numpy as np
import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import Answers, answers_from_probabilities
from lorakeet.evaluate.suspects import suspect_labels, with_shared_words

LABELS = ("a", "b", "c")


def system(name: str, truth: np.ndarray, said: np.ndarray, *, seed: int, sure: float = 0.9) -> Answers:
    """Answers that are `said`, about as surely as `sure`."""
    chance = np.random.default_rng(seed).uniform(sure - 0.08, sure + 0.08, len(said))
    table = np.tile(((1 - chance) / 2)[:, None], 3)
    table[np.arange(len(said)), said] = chance
    return answers_from_probabilities(name, table, labels=LABELS, truth=truth)


def test_planted_wrong_labels_are_found_with_their_right_ones() -> None:
    generator = np.random.default_rng(0)
    right = generator.integers(0, 3, 300)
    given, wrong = right.copy(), np.arange(0, 300, 30)
    given[wrong] = (right[wrong] + 1) % 3
    found = suspect_labels(system("adapter", given, right, seed=1, sure=0.91), system("floor", given, right, seed=2, sure=0.9))
    assert {one.row for one in found} <= set(wrong.tolist()) and len(found) >= 4
    assert all(one.suggested == LABELS[right[one.row]] and one.label == LABELS[given[one.row]] for one in found)
    assert [min(one.probabilities) for one in found] == sorted((min(one.probabilities) for one in found), reverse=True)


def test_a_label_that_no_row_has_suggests_nothing() -> None:
    truth = np.zeros(20, int)
    said = system("adapter", truth, np.full(20, 2), seed=1)
    assert suspect_labels(said, said) == ()


def test_other_rows_are_refused() -> None:
    zeros, ones = np.zeros(3, int), np.ones(3, int)
    with pytest.raises(DataError, match="did not answer the same rows"):
        suspect_labels(system("a", zeros, zeros, seed=0), system("b", ones, ones, seed=0))


def test_a_system_that_is_never_sure_is_no_witness() -> None:
    truth = np.arange(90) % 3
    said = np.where(np.arange(90) % 9 == 0, (truth + 1) % 3, truth)
    sure, unsure = system("floor", truth, said, seed=1), system("adapter", truth, said, seed=2, sure=0.41)
    assert len(suspect_labels(sure, sure)) >= 4
    assert suspect_labels(unsure, sure) == suspect_labels(sure, unsure) == ()


def test_suspects_that_share_a_shortcut_say_which_word_both_witnesses_read() -> None:
    """30 rightly labelled rows of 300 were listed as two independent witnesses' word: both had learned one token."""
    truth = np.arange(300) % 3
    said, tricked = truth.copy(), np.flatnonzero(truth == 1)[:30]
    said[tricked] = 2
    texts = [f"row {number} about topic{truth[number]}" for number in range(300)]
    for row in tricked:
        texts[row] += " zyx"
    left, right = system("adapter", truth, said, seed=1, sure=0.91), system("floor", truth, said, seed=2)
    found = with_shared_words(suspect_labels(left, right), texts, left)
    assert len(found) >= 10 and {one.shared for one in found} == {"zyx"} and all("zyx" in one.text for one in found)
    plain = [text.removesuffix(" zyx") for text in texts]
    wrong = with_shared_words(suspect_labels(left, right), [f"{text} {number % 7}" for number, text in enumerate(plain)], left)
    assert {one.shared for one in wrong} <= {"", "topic1"} and "zyx" not in str(wrong)


def test_a_few_suspects_have_their_texts_and_no_shared_word() -> None:
    truth = np.arange(300) % 3
    said = truth.copy()
    said[np.flatnonzero(truth == 1)[:2]] = 2
    left, right = system("adapter", truth, said, seed=1, sure=0.91), system("floor", truth, said, seed=2)
    found = with_shared_words(suspect_labels(left, right), [f"row {number}" for number in range(300)], left)
    assert 1 <= len(found) <= 2 and all((one.text, one.shared) == (f"row {one.row}", "") for one in found)
