"""The rows of a run that trains on every answer: one answer to a prompt, or none."""

from __future__ import annotations

from collections.abc import Sequence

from lorakeet.data.rows import Row
from lorakeet.data.shapes import added_shapes
from lorakeet.errors import DataError, spelt
from lorakeet.registry import Objective, objectives


def with_one_answer(rows: Sequence[Row], registered: Objective, part: str, *, trained: bool) -> tuple[Row, ...]:
    """The rows as they are. Raises DataError for rows of a shape that another objective trains."""
    for name, shape in added_shapes().items():
        if (other := next(filter(shape.is_of, rows), None)) is not None:
            instead = next(one.name for one in objectives().values() if name in one.shapes)
            raise DataError(
                f"{other.source} has {shape.has}, but {registered}, which trains on every answer. Set "
                f"--train.objective {instead}, or give rows with a prompt and one good answer. If other columns "
                f"have these, choose {spelt('data.format')} chat|completion|alpaca|classification|text."
            )
    return tuple(rows)
