"""What many texts share weighs nothing; what few share weighs its bits, also in a copy of it."""

import math
import random

import numpy as np

from lorakeet.data.copies.rarity import EXPECTED, FEW, HIGHEST, UNSEEN, find_rarity, number_words


def bits_of(texts: list[str]) -> list[list[float]]:
    numbered = number_words(text.split() for text in texts)
    found = find_rarity(numbered).bits
    return [found[numbered.span(text)].tolist() for text in range(len(texts))]


def names(count: int) -> list[str]:
    return [f"name{number}" for number in range(count)]


def test_words_of_a_template_weigh_nothing_and_its_slots_do() -> None:
    found = bits_of([f"where is the town of {name} on this map" for name in names(200)])
    for bits in found:
        assert [value > 0 for value in bits] == [False] * 5 + [True] + [False] * 3


def test_an_instruction_of_one_row_in_fifty_weighs_next_to_nothing() -> None:
    chance = random.Random(0)
    words = [f"w{number}" for number in range(3000)]
    others = [" ".join(chance.choices(words, k=20)) for _ in range(2000)]
    instruction = " ".join(chance.choices(words, k=30))
    found = bits_of([*(f"{instruction} {' '.join(chance.choices(words, k=5))}" for _ in range(40)), *others])
    for bits in found[:40]:
        assert sum(bits[:30]) < 0.1 * 30 * np.mean(bits[30:])


def test_the_pair_that_is_compared_does_not_make_its_own_words_expected() -> None:
    one, _ = bits_of(["seldom heard of words", "seldom heard of words indeed"])
    assert np.allclose(one, math.log2(2 + UNSEEN))  # one of eighteen texts, as if nobody else had them


def test_frequent_words_weigh_their_share() -> None:
    texts = [f"{'common' if number % 4 == 0 else 'else'} {number}" for number in range(400)]
    common = bits_of(texts)[0][0]
    assert abs(common - 2) < 0.1 and EXPECTED < common < HIGHEST


def test_rare_sequences_are_the_same_in_every_order_and_frequent_ones_are_left_out() -> None:
    texts = [
        "a rare set of words here",
        "another rare set of words",
        *(f"very common words of {name}" for name in names(FEW + 9)),
    ]
    numbered = number_words(text.split() for text in texts)
    found = find_rarity(numbered).sequences
    first, second = (set(found[numbered.span(text)].tolist()) - {0} for text in (0, 1))
    assert first & second and not set(found[numbered.span(2)].tolist()) & first
    backwards = number_words(text.split() for text in reversed(texts))
    again = find_rarity(backwards).sequences
    assert set(again[backwards.span(len(texts) - 1)].tolist()) - {0} == first


def test_parts_that_are_sorted_one_after_the_other_change_nothing(monkeypatch) -> None:
    chance = random.Random(1)
    texts = [" ".join(chance.choices("abcdefgh", k=12)) for _ in range(60)]
    whole = bits_of(texts)
    monkeypatch.setattr("lorakeet.data.copies.rarity.AT_ONCE", 50)
    assert bits_of(texts) == whole
