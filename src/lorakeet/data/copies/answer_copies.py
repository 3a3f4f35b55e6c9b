"""Finds compared answers that a training row has too, under another prompt: which is preferred may be known by heart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from lorakeet.data.copies.words import letters, normal_words
from lorakeet.data.rows import Row, common_turns, some_sources
from lorakeet.errors import spelt

FEWEST = 6  # words of an answer that two people do not write by chance
OFTEN = 3  # rows; an answer of more is a set phrase, such as an excuse


def answer_copy_notes(parts: Mapping[str, Sequence[Row]]) -> list[str]:
    """A sentence for each part but the training rows of which some rows have an answer of a training row.

    Case, punctuation and spacing are no difference. Answers of fewer than FEWEST words are not compared.
    """
    answers = {part: [_answers(row) for row in rows] for part, rows in parts.items()}
    counts = Counter(answer for found in answers.values() for own in found for answer in own)
    trained = {answer for own in answers.get("training", ()) for answer in own if counts[answer] <= OFTEN}
    notes = []
    for part, rows in parts.items():
        found = [] if part == "training" else [row for row, own in zip(rows, answers[part], strict=True) if own & trained]
        if not found:
            continue
        named = some_sources([row.source for row in found])
        have = "rows have" if len(found) > 1 else "row has"
        notes.append(
            f"{len(found)} {part} {have} an answer that a training row has too, under another prompt ({named}). Which answer is "
            f"preferred may be known by heart there. Name what belongs together with "
            f"{spelt('data.group_column')}, or leave these rows out."
        )
    return notes


def _answers(row: Row) -> frozenset[str]:
    """The answers of a row that are compared, by their letters; those that are long enough."""
    if row.desirable is None and not row.rejected:
        return frozenset()
    common = common_turns(row.turns, row.rejected) if row.rejected else len(row.turns) - 1
    said = (normal_words("\n".join(turn.text for turn in turns[common:])) for turns in (row.turns, row.rejected) if turns)
    return frozenset(letters(words) for words in said if len(words) >= FEWEST)
