"""Copies under another instruction or in another order are found; rows with other numbers or signs are no copies."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from lorakeet.data.copies.near_copies import find_near_copies
from lorakeet.data.copies.words import normal_words

ADDED = [f"added{number % 7}" for number in range(20)]


def rows(seed: int, count: int = 300) -> list[list[str]]:
    chance = random.Random(seed)
    words, weights = [f"w{n}" for n in range(3000)], [1 / (n + 3) for n in range(3000)]
    return [chance.choices(words, weights, k=chance.randint(10, 16)) for _ in range(count)]


def recall(seed: int, change, everywhere: bool = False) -> float:
    texts, chance = rows(seed), random.Random(seed)
    copies = [change(text, chance) for text in texts[:40]]
    others = [change(text, chance) for text in texts[40:]] if everywhere else texts[40:]
    found = {(copy.first, copy.second) for copy in find_near_copies([*texts[:40], *others, *copies], 0.8)}
    assert len(found) < 50
    return sum((n, 300 + n) in found for n in range(40)) / 40


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("length", [4, 6, 10])
def test_a_copy_with_words_added_before_or_behind_it_is_found(length: int, everywhere: bool) -> None:
    assert recall(1, lambda text, _: [*ADDED[:length], *text], everywhere) >= 0.95
    assert recall(2, lambda text, _: [*text, *ADDED[:length]], everywhere) >= 0.95


MARKUP = (
    "> {}", "| {} |", "| 17 | {} | yes |", "<p>{}</p>", "<div class='x'>{}</div>", "<s>[INST] {} [/INST]", "<|user|>{}<|end|>",
    "Q => {}", "Input -> {}", "{} =", "{} = ?", "=== Text ===\n{}", "Text\n=====\n{}", ">>> {}", "~~{}~~", "{} <end>",
    "Solve for x + y = : {}", "5 % say: {}", "C++: {}", "{}\n| a | b |",
)  # fmt: skip


@pytest.mark.parametrize("form", MARKUP)
@pytest.mark.parametrize("everywhere", [False, True])
def test_signs_of_markup_and_of_added_text_hide_no_copy(form: str, everywhere: bool) -> None:
    """0 of 40 were found: a sign beside the text that was added made another row of each."""

    def within(text: list[str], _: random.Random) -> list[str]:
        return normal_words(form.format(" ".join(text)))

    texts = [normal_words(" ".join(text)) for text in rows(5)]
    others = [within(text, random.Random()) for text in texts[40:]] if everywhere else texts[40:]
    copies = [within(text, random.Random()) for text in texts[:40]]
    found = {(copy.first, copy.second) for copy in find_near_copies([*texts[:40], *others, *copies], 0.8)}
    same = {n for n in range(40) if texts[n] == copies[n]}  # without the markup an exact copy
    assert sum((n, 300 + n) in found or n in same for n in range(40)) >= 38 and len(found) < 45


@pytest.mark.parametrize("place", range(12))
def test_a_word_misspelt_anywhere_in_a_question_of_one_slot_is_found(place: int) -> None:
    """A change between two words that weigh nothing made these the copy's own, which was too long then: 18 of 201 were missed."""
    names = [f"town{n}" for n in range(400)]
    asked = [f"What is the capital of {name}, and how many people live there?" for name in names]
    copy = normal_words(asked[7])
    if place != 5:  # the slot
        copy[place] += "x"
        found = find_near_copies([*map(normal_words, asked), copy], 0.8)
        assert [(each.first, each.second) for each in found] == [(7, 400)]


ONE, ANOTHER = ([f"{name}{'stuvwxyz'[n]} text of {name} the part{'wxyz'[n % 4]}".split() for n in range(8)] for name in "ab")


def test_a_copy_under_another_of_many_instructions_is_found() -> None:
    """0.23 to 0.63 were found where each row has one of ten instructions, and each copy one of ten others."""
    chance, texts = random.Random(6), rows(6)
    given = [[*chance.choice(ONE), *text] for text in texts]
    copies = [[*chance.choice(ANOTHER), *text] for text in texts[:40]]
    found = {(copy.first, copy.second) for copy in find_near_copies([*given, *copies], 0.8)}
    assert sum((n, 300 + n) in found for n in range(40)) >= 38 and len(found) < 45


def two_changed(text: list[str], chance: random.Random) -> list[str]:
    places = chance.sample(range(len(text)), 2)
    return [f"new{chance.randrange(10**6)}" if place in places else word for place, word in enumerate(text)]


def turned(text: list[str], chance: random.Random) -> list[str]:
    place = chance.randint(4, len(text) - 4)
    return text[place:] + text[:place]


def test_two_words_changed_and_clauses_in_another_order_are_found() -> None:
    assert recall(3, two_changed) >= 0.8 and recall(4, turned) >= 0.8


FORMS = {
    "SQL": [f"SELECT name FROM orders WHERE qty {sign} {n}" for sign in ("=", "<", ">", "<=", ">=", "!=") for n in range(20, 40)],
    "code": [f"return total {sign} size of box {n}" for sign in "+-*/<>%" for n in range(20)],
    "word problems": [
        f"Tom has {a} apples and buys {b} more. How many are there now?" for a in range(2, 14) for b in range(3, 13)
    ],
    "ions": [
        f"Name the ion {name}{charge} in this cup of water"
        for name in ("Cu", "Fe", "Na", "Cl", "SO4")
        for charge in ["2+", "2-", "3+", "+", "-", ""]
    ],
    "single numbers": [f"A train leaves with {n} people and comes back with none" for n in range(2, 60)],
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_other_numbers_or_signs_are_no_copies(form: str) -> None:
    words = list(map(normal_words, FORMS[form]))
    assert all(one != other for one, other in combinations(words, 2))
    assert find_near_copies(words, 0.8) == []


def test_a_number_or_sign_that_was_added_beside_a_text_makes_another() -> None:
    text = "the pump delivers this much water in one day of the dry season x"
    pairs = (f"{text} + y", 0), (f"2 * {text}", 0), (f"-5 {text}", 1), (f"Question 12: {text}", 1), (f"{text} please answer", 1)
    for other, count in pairs:
        assert len(find_near_copies(map(normal_words, (text, other)), 0.8)) == count, other


def of_few_phrases(seed: int, count: int = 1000) -> list[list[str]]:
    """Rows of six slots, with one of ten phrases each: of three words, which other phrases have too."""
    chance, found = random.Random(seed), dict[tuple[int, ...], None]()
    while len(found) < count:
        found[tuple(chance.randrange(10) for _ in range(6))] = None
    parts = (("a", 5), ("b", 4), ("c", 3))
    return [[f"{part}{slot % 3}of{n % few}" for slot, n in enumerate(row) for part, few in parts] for row in found]


FEW = {  # and how many of 40 are found at least
    "text before": (lambda row: [*ADDED[:6], *row], 36),
    "as much before as the row has": (lambda row: [*ADDED[: len(row)], *row], 36),
    "clauses turned": (lambda row: [*row[9:], *row[:9]], 26),
}


@pytest.mark.parametrize("name", FEW)
def test_copies_are_found_among_rows_of_few_phrases(name: str) -> None:
    change, least = FEW[name]
    texts = of_few_phrases(9)
    found = {(copy.first, copy.second) for copy in find_near_copies([*texts, *map(change, texts[:40])], 0.8)}
    assert sum((n, 1000 + n) in found for n in range(40)) >= least
    assert sum(other < 1000 for _, other in found) < 1000 * 999 / 2 / 1000


def test_a_long_row_may_have_a_few_other_values() -> None:
    """Of code of 5,000 words with one word in a hundred replaced 4 of 30 were found: each other number made another row."""
    chance = random.Random(10)
    words = ["".join(chance.choices("aeioustrnl", k=6)) for _ in range(3000)] + [str(n) for n in range(300)]
    texts = [chance.choices(words, k=1000) for _ in range(40)]
    copies = [[chance.choice(words) if chance.random() < 0.01 else word for word in text] for text in texts[:20]]
    found = find_near_copies([*texts, *copies], 0.8)
    assert [(copy.first, copy.second) for copy in found] == [(n, 40 + n) for n in range(20)]
    other = [*texts[0][:60], "7"], [*texts[0][:60], "8"]
    assert find_near_copies([*texts[1:], *other], 0.8) == []
