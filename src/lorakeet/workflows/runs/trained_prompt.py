"""The prompt that a run was trained on, around a text that is typed: what its rows became before the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorakeet.data.predicted.unlabelled import row_shaper
from lorakeet.data.spec import DataSpec, template_fields
from lorakeet.data.split import read_split_record
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.errors import ConfigError
from lorakeet.train.run import RunFolder

_TYPED = "the message"


def trained_labels(run: RunFolder | None, data: DataSpec) -> tuple[str, ...]:
    """The labels of a run, in the order of its report; of a bare adapter those of its settings. Empty for prompts."""
    return data.labels if run is None or not run.split.is_file() else recorded_labels(run.split)


def recorded_labels(split: Path) -> tuple[str, ...]:
    """The labels in a run's split.json; empty where there is no such file, and for prompts."""
    known = read_split_record(split).get("labels") if split.is_file() else None
    return tuple(map(str, known)) if isinstance(known, list) else ()


def trained_prompt(text: str, data: DataSpec, labels: Sequence[str]) -> str:
    """The user's turn that training, `evaluate` and `predict` make of a text: data.template, filled. Without labels, the text.

    ConfigError for an empty text, and for a template that has other columns too.
    """
    if not labels:
        return text
    if others := sorted({*template_fields(data.template)} - {"text", data.text_column}):
        raise ConfigError(
            f"The prompts of this run have the columns {', '.join(map(repr, others))} too, which one text does not hold. Answer "
            "a file that has them: lorakeet predict."
        )
    problems = RowProblems("The message cannot be answered")
    row = row_shaper(_TYPED, data, labels, problems)(FileRecord(_TYPED, {data.text_column: text}))
    if row is None:
        raise ConfigError(f"{problems.first}")
    return next(turn.text for turn in row.turns if turn.role == "user")
