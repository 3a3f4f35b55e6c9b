"""Alignment is exact; near-copies are found at every place, and what is common to many texts is none."""

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.data.copies.near_copies import _Search, align, fewest_words, find_near_copies
from lorakeet.data.copies.rarity import number_words

WORDS = [f"word{number}" for number in range(2000)]


def sentences(count: int, *, seed: int, length: int) -> list[list[str]]:
    chance = random.Random(seed)
    return [chance.choices(WORDS, k=length) for _ in range(count)]


def longest_common(first: Sequence[int], second: Sequence[int]) -> int:
    row = [0] * (len(second) + 1)
    for one in first:
        before = 0
        for j, other in enumerate(second, start=1):
            before, row[j] = row[j], before + 1 if one == other else max(row[j], row[j - 1])
    return row[-1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=14), st.lists(st.integers(0, 5), max_size=14))
def test_an_alignment_is_a_longest_common_subsequence(first: list[int], second: list[int]) -> None:
    pairs = align(first, second)
    assert all(first[i] == second[j] for i, j in pairs) and len(pairs) == longest_common(first, second)
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(pairs))


@pytest.mark.slow
@pytest.mark.parametrize("length", [4, 5, 9, 16, 17, 24])
def test_one_changed_word_is_found_at_every_place(length: int) -> None:
    texts = sentences(200, seed=length, length=length)
    original = texts[0]
    for place in range(length):
        changed = [*original[:place], "changed", *original[place + 1 :]]
        left_out = original[:place] + original[place + 1 :]
        added = [*original[:place], "added", *original[place:]]
        for copy in (changed, left_out, added):
            (found,) = find_near_copies([*texts, copy], 0.8)
            assert (found.first, found.second) == (0, 200)
            assert found.similarity == pytest.approx(1 - 1 / max(length, len(copy)))


@pytest.mark.parametrize("length", [80, 600])
def test_one_changed_word_is_found_in_longer_texts(length: int) -> None:
    texts = sentences(100, seed=length, length=length)
    copies = [[*text[:place], "changed", *text[place + 1 :]] for place, text in enumerate(texts[:60])]
    assert [(found.first, found.second) for found in find_near_copies([*texts, *copies], 0.8)] == [
        (n, 100 + n) for n in range(60)
    ]


def test_three_words_are_too_few_for_a_change_and_six_characters_are_enough() -> None:
    assert find_near_copies([["acute", "bronchial", "asthma"], ["chronic", "bronchial", "asthma"]], 0.8) == []
    assert find_near_copies([list("急性胃炎"), list("慢性胃炎")], 0.8) == []
    assert len(find_near_copies([list("他忘记带雨伞了"), list("她忘记带雨伞了")], 0.8)) == 1


def test_one_word_may_differ_in_texts_that_are_long_enough_for_the_threshold() -> None:
    assert [fewest_words(threshold) for threshold in (0.5, 0.8, 0.9, 0.99)] == [2, 4, 8, 80] and fewest_words(1) > 10**9


def test_slots_of_a_template_are_no_copies_and_a_copy_in_it_is() -> None:
    chance = random.Random(3)
    before, after = sentences(2, seed=5, length=25)
    inputs = sentences(400, seed=4, length=6)
    rows = [[*before, *words, *after] for words in inputs]
    assert find_near_copies(rows, 0.8) == []
    copy = [*before, *inputs[9], *after]
    copy[25 + chance.randrange(6)] = "changed"
    (found,) = find_near_copies([*rows, copy], 0.8)
    assert (found.first, found.second) == (9, 400) and found.similarity == pytest.approx(5 / 6)
    misspelt = [*before[:3], "teh", *before[4:], *inputs[11], *after]
    (found,) = find_near_copies([*rows, misspelt], 0.8)
    assert (found.first, found.second) == (11, 400)


def test_few_or_empty_texts() -> None:
    assert find_near_copies([], 0.8) == find_near_copies([["one"]], 0.8) == find_near_copies([[], ["one"], []], 0.8) == []


@pytest.mark.parametrize("threshold", [0.6, 0.8, 1.0])
def test_pairs_left_out_by_their_words_alone_are_never_copies(threshold: float) -> None:
    chance = random.Random(31)
    words, weights = [f"w{n}" for n in range(800)], [1 / (n + 3) for n in range(800)]
    texts = [chance.choices(words, weights, k=chance.randint(4, 14)) for _ in range(1200)]
    changed = []
    for text in texts[:200]:
        place, other = chance.randrange(len(text)), chance.choice(texts)
        replaced = [*text[:place], "new", *text[place + 1 :]]
        changed += [replaced, [*other, *text], [*text, *other], text[place:] + text[:place]]
    search = _Search(number_words([*texts, *changed]), threshold)
    first, second = np.repeat(np.arange(200), 8), 1200 + np.arange(1600) // 2
    second[1::2] = np.random.default_rng(31).integers(200, 1200, 800)
    possible = search._may_be_copies(first, second)
    copies = [search._compare(*pair) is not None for pair in zip(first.tolist(), second.tolist(), strict=True)]
    assert not (np.array(copies) & ~possible).any()
    assert (~possible).sum() > 100 and (sum(copies) > 100 or threshold == 1)
