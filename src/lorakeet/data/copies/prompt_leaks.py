"""Finds evaluated rows whose text stands in a prompt template or a system prompt, such as an example that was pasted there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from lorakeet.data.copies.words import CHARACTER_LENGTH, is_character, normal_words
from lorakeet.data.rows import Row, some_sources
from lorakeet.errors import DataError

LEAST = 4  # words of a text that stands nowhere by chance


def rows_in_prompts(evaluated: Sequence[Row], prompts: Iterable[Row]) -> tuple[Row, ...]:
    """The `evaluated` rows whose words stand, in their order, in text of the `prompts` that came from no row.

    Texts of fewer than LEAST words are not searched for. The time is linear in all words.
    """
    sought: dict[tuple[str, ...], list[tuple[list[str], Row]]] = defaultdict(list)
    for row in evaluated:
        words = normal_words(row.text)
        if sum(CHARACTER_LENGTH if is_character(word) else 1.0 for word in words) > LEAST - 0.01:
            sought[tuple(words[:LEAST])].append((words, row))
    found: dict[str, Row] = {}
    for fixed in {text for row in prompts for text in _fixed_texts(row)}:
        words = normal_words(fixed)
        for place in range(len(words) - LEAST + 1):
            for searched, row in sought.get(tuple(words[place : place + LEAST]), ()):
                if words[place : place + len(searched)] == searched:
                    found[row.source] = row
    return tuple(found[source] for source in sorted(found))


def prompt_leak_notes(parts: Mapping[str, Sequence[Row]], on_leak: str) -> list[str]:
    """A sentence for each part but the training rows of which some stand in a prompt. DataError if `on_leak` is "refuse"."""
    every = [row for rows in parts.values() for row in rows]
    notes = []
    for part, rows in parts.items():
        found = () if part == "training" else rows_in_prompts(rows, every)
        if not found:
            continue
        named = some_sources([row.source for row in found])
        stand = "rows stand" if len(found) > 1 else "row stands"
        notes.append(
            f"{len(found)} {part} {stand} in the prompt template or a system prompt ({named}), so numbers on such rows prove "
            "nothing. Take their text out of it."
        )
    if notes and on_leak == "refuse":
        raise DataError(" ".join(notes))
    return notes


def _fixed_texts(row: Row) -> Iterable[str]:
    """What is said in a row's prompt by its template and its system prompt."""
    for turn in row.turns:
        if turn.role == "system":
            yield turn.text
        elif turn.free is not None and not turn.supervised:
            yield turn.text[: turn.free[0]]
            yield turn.text[turn.free[1] :]
