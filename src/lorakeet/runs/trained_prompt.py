"""The prompt that a run was trained on, around a text that is typed: what its rows became before the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lorakeet.data.predicted.unlabelled import row_shaper
from lorakeet.data.spec import DataSpec, fill_template, template_fields
from lorakeet.data.split import read_split_record
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.errors import ConfigError
from lorakeet.train.run import RunFolder

_TYPED = "the message"


def trained_labels(run: RunFolder | None, data: DataSpec) -> tuple[str, ...]:
    """The labels of a run, in the order of its report: of its split.json, else of its settings. Empty for prompts."""
    if run is None or not run.split.is_file():
        return data.labels
    known = read_split_record(run.split).get("labels")
    return tuple(map(str, known)) if isinstance(known, list) else ()


def trained_prompt(text: str, data: DataSpec, labels: Sequence[str]) -> str:
    """The user's turn that training, `evaluate` and `predict` make of a text: data.template, filled.

    The text as it is without labels, and where it begins and ends as the template does. ConfigError for an empty text, and for a
    template that has other columns too.
    """
    if not labels or _stands_in(data.template, text):
        return text
    if others := sorted({*template_fields(data.template)} - {"text", data.text_column}):
        raise ConfigError(
            f"The prompts of this run have the columns {', '.join(map(repr, others))} too, which one text does not hold: its "
            f"data.template is {data.template!r}. Give the whole prompt as that writes it, or answer a file: lorakeet predict."
        )
    problems = RowProblems("The message cannot be answered")
    row = row_shaper(_TYPED, data, labels, problems)(FileRecord(_TYPED, {data.text_column: text}))
    if row is None:
        raise ConfigError(f"{problems.first}")
    return next(turn.text for turn in row.turns if turn.role == "user")


def prompt_settings(data: DataSpec, run: RunFolder | None) -> DataSpec:
    """The settings by which a run writes prompts: with its labels (`trained_labels`); without labels no template either."""
    labels = trained_labels(run, data)
    return replace(data, labels=labels) if labels else unlabelled(data)


def unlabelled(data: DataSpec) -> DataSpec:
    """The settings without labels and template: `trained_prompt` then leaves a text as it is."""
    return replace(data, labels=(), template=DataSpec.template)


def _stands_in(template: str, text: str) -> bool:
    """True for a text that begins and ends as the filled template does; never for a template that adds signs alone."""
    fields = template_fields(template)
    before, *_, after = fill_template(template, dict.fromkeys(fields, "\0"), fields[0])[0].split("\0")
    if not any(map(str.isalnum, before + after)):  # many a text ends in a point or a question mark by itself
        return False
    return len(before) + len(after) <= len(text) and text.startswith(before) and text.endswith(after)
