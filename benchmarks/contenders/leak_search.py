"""The search for copies among many rows, alone in a process: seconds and peak memory."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from harness.planted import INSTRUCTION, review_texts

from contenders.timed_step import answer
from lorakeet.data.leaks import find_duplicates
from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.memory.measure import peak_bytes, resident_bytes

_COPIES = 0.02  # of the rows are copies of others, with one word changed
_HELD_OUT = 0.1


def measured(asked: Mapping[str, Any]) -> dict[str, Any]:
    """`asked`: `kind` and number of `rows`, and a `seed`."""
    chance = random.Random(asked["seed"])
    texts = _texts(asked["kind"], asked["rows"], chance)
    place = round(len(texts) * _HELD_OUT)
    for number in range(round(len(texts) * _COPIES)):
        words = texts[number].split()
        words[chance.randrange(len(words))] = "changed"
        texts[-1 - number] = " ".join(words)
    rows = [Row((Turn("user", text, False),), "ab"[i % 2], None, f"rows:{i}") for i, text in enumerate(texts)]
    before, began, processor = resident_bytes(), time.perf_counter(), time.process_time()
    pairs = find_duplicates({"held-out": rows[:place], "training": rows[place:]}, DataSpec.near_duplicates)
    return {
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
        "peak_bytes": peak_bytes(),
        "bytes_before": before,
        "text_bytes": sum(len(text.encode()) for text in texts),
        "words": sum(len(text.split()) for text in texts),
        "pairs": dict(Counter(pair.kind for pair in pairs)),
    }


def _texts(kind: str, count: int, chance: random.Random) -> list[str]:
    """Reviews by a chain of words; labels of 4 to 9 words; or short inputs behind an instruction."""
    chain = _Chain(review_texts())
    if kind == "reviews":
        return [chain.text(chance, max(4, round(chance.lognormvariate(4.2, 0.6)))) for _ in range(count)]
    if kind == "labels":
        return [chain.text(chance, chance.randint(4, 9)) for _ in range(count)]
    return [INSTRUCTION.replace("{}", chain.text(chance, chance.randint(4, 16))) for _ in range(count)]


class _Chain:
    """Words that follow each other as in real texts; one in four follows nothing, and one in ten is rare."""

    def __init__(self, texts: list[str]) -> None:
        self.after: dict[str, list[str]] = defaultdict(list)
        self.words: list[str] = []
        for text in texts:
            words = text.split()
            self.words += words
            for word, following in pairwise(words):
                self.after[word].append(following)

    def text(self, chance: random.Random, length: int) -> str:
        """A text of `length` words."""
        word, found = "", []
        for _ in range(length):
            follows = self.after.get(word)
            word = chance.choice(self.words if follows is None or chance.random() < 0.25 else follows)
            found.append(f"{word}{int(chance.paretovariate(0.4)) % 10**6}" if chance.random() < 0.1 else word)
        return " ".join(found)


if __name__ == "__main__":
    answer(measured)
