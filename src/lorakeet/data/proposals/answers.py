"""Names answers that are no valid JSON where nearly all others are: a slip of the file, which a model would learn."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lorakeet.data.rows import Row

_FEWEST = 10  # answers from which a share is evidence
_SAMPLED = 200  # answers that decide whether all others are read
_NEARLY_ALL = 0.9
_NAMED = 5
_EXCERPT = 60  # characters


def broken_json_notes(rows: Sequence[Row]) -> list[str]:
    """A sentence on the last answers of these rows that are no JSON object or list, if nearly all are; else nothing."""
    answered = [row for row in rows if row.label is None and row.turns and row.turns[-1].role == "assistant"]
    sample = answered[:_SAMPLED]
    if len(answered) < _FEWEST or sum(map(_is_json, sample)) < _NEARLY_ALL * len(sample):
        return []
    broken = [row for row in answered if not _is_json(row)]
    if not broken or len(broken) > (1 - _NEARLY_ALL) * len(answered):
        return []
    sources = ", ".join(row.source for row in broken[:_NAMED])
    more = f" and {len(broken) - _NAMED:,} more" if len(broken) > _NAMED else ""
    is_are, these = ("answers is", "that row") if len(broken) == 1 else ("answers are", "these rows")
    return [
        f"{len(broken):,} of {len(answered):,} {is_are} no valid JSON, and the others are: {sources}{more}; the first ends "
        f"in {broken[0].turns[-1].text.strip()[-_EXCERPT:]!r}. Mend or remove {these}, since a model learns them."
    ]


def _is_json(row: Row) -> bool:
    text = row.turns[-1].text.strip()
    if not text.startswith(("{", "[")):
        return False
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False
