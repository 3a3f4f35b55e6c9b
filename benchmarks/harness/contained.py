"""Copies within other text, in another order or with two words changed; and different rows that have other numbers or signs."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from itertools import product

ROWS, COPIES = 1800, 80
Edit = Callable[[list[str], random.Random], list[str]]
_INSTRUCTION = re.findall(
    r"\w+",
    "Please read the following text with great care and then tell in one short sentence what the person who wrote it thinks of "
    "the medicine that was taken and whether it did any good at all in the end",
)
MARKUP = (
    "> {}", "| 17 | {} | yes |", "<p>{}</p>", "<s>[INST] {} [/INST]", "<|user|>{}<|end|>", "Input -> {}", "{} = ?",
    "=== Text ===\n{}", "{} => ", ">>> {}", '{{"text": "{}"}}', "~~{}~~", "Solve for x + y = : {}", "{} (1 = bad, 5 = good)",
)  # fmt: skip
_ONE = (
    "Classify this text:", "Here is some text, please label it.", "Read carefully and answer:", "What is this about?",
    "Tell me the class of the following.", "Please say which label fits", "Decide the category of this:", "Input text below:",
)  # fmt: skip
_ANOTHER = (
    "Answer with one of the labels given.", "Consider the passage that comes next.", "Q:", "TASK 7: sort it", "Category?",
    "Give 3 labels at most for:", "In 5 words or less, describe", "Given the content, find its kind:", "Which of these is it?",
)  # fmt: skip
_SIGNS = ("=", "!=", "<", "<=", ">", ">=")


def _shared(before: float, behind: float) -> Edit:
    """The beginning of one instruction, as many words as this share of the row's."""
    return lambda text, _: [
        *_INSTRUCTION[: round(before * len(text))], *text, *_INSTRUCTION[: round(behind * len(text))],
    ]  # fmt: skip


def _own(behind: bool) -> Edit:
    """As many words as the row has, of its own."""

    def edit(text: list[str], chance: random.Random) -> list[str]:
        words = [f"{chance.choice(text)}{chance.choice('aeiou')}{chance.choice('lmnrst')}" for _ in text]
        return [*text, *words] if behind else [*words, *text]

    return edit


def _two_changed(text: list[str], chance: random.Random) -> list[str]:
    places = chance.sample(range(len(text)), 2)
    return [chance.choice(_INSTRUCTION) if place in places else word for place, word in enumerate(text)]


def _turned(text: list[str], chance: random.Random) -> list[str]:
    place = chance.randint(4, len(text) - 4)
    return text[place:] + text[:place]


def _in_markup(text: list[str], chance: random.Random) -> list[str]:
    return chance.choice(MARKUP).format(" ".join(text)).split(" ")


def _behind(instructions: Sequence[str]) -> Edit:
    """The row below one of these instructions."""
    return lambda text, chance: [*chance.choice(instructions).split(), *text]


ORIGINALS = {"another instruction": _behind(_ONE)}  # edits of all but the copies
EDITS: dict[str, tuple[Edit, int]] = {  # with the fewest words of a row
    "six words before": (lambda text, _: [*_INSTRUCTION[:6], *text], 5),
    "four words behind": (lambda text, _: [*text, *_INSTRUCTION[:4]], 5),
    "as many words before": (_shared(1, 0), 5),
    "as many words behind": (_shared(0, 1), 5),
    "half as many before and behind": (_shared(0.5, 0.5), 5),
    "as many own words before": (_own(False), 5),
    "as many own words behind": (_own(True), 5),
    "markup around": (_in_markup, 5),
    "another instruction": (_behind(_ANOTHER), 5),
    "two words replaced": (_two_changed, 10),
    "clauses in another order": (_turned, 10),
}
ORDERED = ("two words replaced", "clauses in another order")  # of which fewer have to be found


def edited(sentences: Sequence[str], name: str, *, every: bool, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Originals, other rows and copies of the originals; `every`: other rows are edited too."""
    edit, fewest = EDITS[name]
    chance = random.Random(f"{name} {seed}")
    rows = [text for text in sentences if fewest <= len(text.split()) <= 40][:ROWS]

    def made(text: str, edit: Edit | None) -> str:
        return text if edit is None else " ".join(edit(text.split(), chance))

    first = ORIGINALS.get(name)
    others = [made(text, edit if every and (first is None or n % 2) else first) for n, text in enumerate(rows[COPIES:])]
    return [made(text, first) for text in rows[:COPIES]], others, [made(text, edit) for text in rows[:COPIES]]


def different_rows() -> dict[str, list[str]]:
    """Rows of forms in which a number or a sign alone makes another row."""
    columns, names = ("qty", "price", "age", "score"), ("Tom", "Ada", "Lin", "Omar", "Eva")
    elements = ("Cu", "Fe", "Na", "Cl", "SO4", "NH4", "Ca", "Br", "NO3", "Mg", "Zn", "K", "PO4", "Al", "Ag")
    return {
        "SQL": [
            f"SELECT name FROM orders WHERE {column} {sign} {n} ORDER BY name"
            for column, sign, n in product(columns, _SIGNS, range(20, 64))
        ],
        "code": [
            f"return total_{name} {sign} size_of_box[{n}]"
            for name, sign, n in product(columns, ("+", "-", "*", "/", "%", "<", ">", "==", "!=", "<="), range(24))
        ],
        "word problems": [
            f"{name} has {a} apples and buys {b} more at the market. How many apples does {name} have now?"
            for name, a, b in product(names, range(2, 17), range(3, 20))
        ],
        "ions": [
            f"Name the ion {element}{charge} in this cup of water"
            for element, charge in product(elements, ("2+", "2-", "3+", "3-", "+", "-", "", "2", "4+"))
        ],
        "thresholds": [
            f"Reject the part if its width is {sign} {n} mm or the batch is old"
            for sign, n in product((*_SIGNS, "≤", "≥"), range(20, 90))
        ],
    }
