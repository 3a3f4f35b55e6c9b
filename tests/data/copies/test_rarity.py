"""What many texts share weighs nothing; what few share weighs its bits, also in a copy of it."""

import math
import random

import numpy as np

from lorakeet.data.copies.rarity import EXPECTED, HIGHEST, UNSEEN, find_rarity, number_words


def bits_of(texts: list[str]) -> list[list[float]]:
    numbered = number_words(text.split() for text in texts)
    found = find_rarity(numbered).bits
    return [found[numbered.span(text)].tolist() for text in range(len(texts))]


def test_the_pair_that_is_compared_does_not_make_its_own_words_expected() -> None:
    one, _ = bits_of(["seldom heard of words", "seldom heard of words indeed"])
    assert np.allclose(one, math.log2(2 + UNSEEN))  # one of eighteen texts, as if nobody else had them


def test_frequent_words_weigh_their_share() -> None:
    texts = [f"{'common' if number % 4 == 0 else 'else'} {number}" for number in range(400)]
    common = bits_of(texts)[0][0]
    assert abs(common - 2) < 0.1 and EXPECTED < common < HIGHEST


def test_parts_that_are_sorted_one_after_the_other_change_nothing(monkeypatch) -> None:
    chance = random.Random(1)
    texts = [" ".join(chance.choices("abcdefgh", k=12)) for _ in range(60)]
    whole = bits_of(texts)
    monkeypatch.setattr("lorakeet.data.copies.rarity.AT_ONCE", 50)
    assert bits_of(texts) == whole
