"""Rows that say little or much: of some ten phrases a slot, of fields, and of 5,000 words of code; and copies of them."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

ROWS, COPIES, LONG = 1500, 40, 60  # of the long rows there are fewer
WORDS = 5000  # of a long row
REPLACED = 0.01  # of its words
_PHRASES = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))
LANGUAGES = tuple(_PHRASES)
_FIELDS = {
    "name": (
        "Ann Lee", "Ben Ode", "Carla Moss", "Deniz Ak", "Emil Berg", "Fay Chu", "Gita Rao", "Hugo Sand", "Ines Paz", "Jon Weir"
    ),
    "city": ("Oslo", "Lima", "Kyoto", "Accra", "Basel", "Cork", "Delft", "Essen", "Faro", "Graz"),
    "job": ("nurse", "baker", "pilot", "teacher", "lawyer", "farmer", "painter", "cook", "driver", "clerk"),
    "status": ("active", "pending", "closed", "blocked", "new"),
    "phone": ("Pixel 8", "Xperia 5", "Moto G", "Nokia 3310", "Galaxy S23"),
    "colour": ("black", "white", "red", "blue", "grey"),
}  # fmt: skip
Planted = tuple[list[str], list[str]]  # all rows, and copies of the first of them


def of_phrases(language: str, seed: int) -> dict[str, Planted]:
    """By change: rows of six slots, and copies with one word changed, other text around, or clauses turned."""
    about, chance = _PHRASES[language], random.Random(f"phrases {language} {seed}")
    slots, between = about["slots"], about["between"]
    rows: dict[tuple[str, ...], None] = {}
    while len(rows) < ROWS:
        rows[tuple(map(chance.choice, slots))] = None

    def units(text: str) -> list[str]:
        return text.split() if between else list(text)

    other = units(about["instruction"])
    some = other[: 6 if between else 9]
    every = sorted({unit for slot in slots for phrase in slot for unit in units(phrase)})

    def replaced(row: Sequence[str]) -> list[str]:
        made = units(between.join(row))
        place = chance.randrange(len(made))
        made[place] = chance.choice([unit for unit in every if unit != made[place]])
        return made

    changes: dict[str, Callable[[tuple[str, ...]], list[str]]] = {
        "one replaced": replaced,
        "text before": lambda row: [*some, *units(between.join(row))],
        "as much before": lambda row: [*(other * 3)[: len(units(between.join(row)))], *units(between.join(row))],
        "text around": lambda row: [*some[::2], *units(between.join(row)), *other[-3:]],
        "clauses turned": lambda row: units(between.join((*row[3:], *row[:3]))),
    }
    texts = [between.join(row) for row in rows]
    return {name: (texts, [between.join(change(row)) for row in list(rows)[:COPIES]]) for name, change in changes.items()}


def of_fields(seed: int) -> Planted:
    """Rows of six fields and an age, and copies with these in another order."""
    chance = random.Random(f"fields {seed}")
    rows: dict[tuple[str, ...], None] = {}
    while len(rows) < ROWS:
        values = {**{key: chance.choice(some) for key, some in _FIELDS.items()}, "age": str(chance.randint(18, 90))}
        rows[tuple(f"{key}: {value}" for key, value in values.items())] = None
    copies = ["\n".join(chance.sample(row, len(row))) for row in list(rows)[:COPIES]]
    return ["\n".join(row) for row in rows], copies


def of_code(seed: int) -> Planted:
    """Long pieces of Python's own library, and copies with a word in a hundred replaced."""
    chance = random.Random(f"code {seed}")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    pieces: list[list[str]] = []
    for file in chance.sample(files, len(files)):
        words = file.read_text(encoding="utf-8", errors="ignore").split() if "packages" not in str(file) else []
        pieces += [words[:WORDS]] if len(words) >= WORDS else []
        if len(pieces) == LONG:
            break
    every = [word for piece in pieces for word in piece]
    copies = [[chance.choice(every) if chance.random() < REPLACED else word for word in piece] for piece in pieces[:COPIES]]
    return list(map(" ".join, pieces)), list(map(" ".join, copies))
