"""Says where prompts do not name the labels, which a model without training cannot know then."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorakeet.data.rows import Row

_SAMPLED = 16  # rows, whose prompts are of one template
_NAMED = 8


def unnamed_labels_note(rows: Sequence[Row], labels: Sequence[str], template: str, *, few_shot: bool) -> str:
    """A sentence if the prompts of labelled `rows` do not name all labels, with a `template` that does; else an empty string.

    `few_shot`: a few-shot base is compared, which sees them.
    """
    prompts = [" ".join(turn.text for turn in row.turns[:-1]) for row in rows[:_SAMPLED]]
    found = [re.compile(rf"(?<!\w){re.escape(label)}(?!\w)", re.I) for label in labels]
    if not labels or all(word.search(prompt) for word in found for prompt in prompts):
        return ""
    named = f"{template}\nAnswer with one of: {', '.join(labels[:_NAMED])}{', …' if len(labels) > _NAMED else ''}"
    advice = " The few-shot base sees them." if few_shot else ""
    return (
        f"The prompts do not name all {len(labels)} labels, so the base cannot know them: part of the gain over it may be just "
        f"that.{advice} To train with their names, set data.template, for instance {named!r}."
    )
