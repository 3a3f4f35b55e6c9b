"""Rows without an answer, for a model to give one: the shape of each record, and a place for the answer that nothing reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakeet.data.proposals.columns import near_column, propose_columns
from lorakeet.data.rows import Row
from lorakeet.data.shapes import shape_rows
from lorakeet.data.spec import DataSpec, template_fields
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.errors import DataError

_ANSWER = "a"  # stands where the answer will
_CHATS = ("messages", "conversations")


def fitting_columns(first: Sequence[FileRecord], name: str, spec: DataSpec, labels: Sequence[str]) -> tuple[DataSpec, str]:
    """The settings that read these records, and a sentence on a column that is taken for another; empty if none is.

    A text column whose name differs in case or accents only is taken. DataError for a column that is missing.
    """
    columns = first[0].values
    if not labels:
        _prompt_format(columns, name)
        return spec, ""
    fields = template_fields(spec.template)
    missing = [spec.text_column if field == "text" else field for field in fields]
    missing = [column for column in missing if column not in columns]
    if not missing:
        return spec, ""
    same = near_column(missing[0], columns) if missing == [spec.text_column] else None
    if same is not None and same.casefold() == spec.text_column.casefold():
        said = f"Column {same!r} is taken for {spec.text_column!r}, as it was called in training."
        return replace(spec, text_column=same), said
    proposal = propose_columns(first, {"text": None, "label": None})
    found = same or (proposal.text if proposal else None)
    text_alone = found is not None and missing == [spec.text_column]
    advice = f" If {found!r} is the text, set --text-column {found!r}." if text_alone else " Rename the columns, or add them."
    named = ", ".join(map(repr, missing))
    listed = ", ".join(map(repr, columns))
    raise DataError(f"{name} has no column {named}, which the run was trained on; it has {listed}.{advice}")


def row_shaper(name: str, spec: DataSpec, labels: Sequence[str], problems: RowProblems) -> Callable[[FileRecord], Row | None]:
    """A function that makes a row of a record, whose answer is a place holder; None, and a problem, for one without text."""
    spec = replace(spec, group_column=None, labels=())

    def shaped(record: FileRecord) -> Row | None:
        if labels:
            values = {**record.values, spec.label_column or "label": labels[0]}
            own = replace(spec, format="classification")
        else:
            values, own = _with_place(record.values, name), replace(spec, format=_prompt_format(record.values, name))
        return next(shape_rows(iter([FileRecord(record.source, values)]), name, own, problems), None)

    return shaped


def _prompt_format(columns: Mapping[str, object], name: str) -> Any:
    if any(column in columns for column in _CHATS):
        return "chat"
    if "prompt" in columns:
        return "completion"
    if "instruction" in columns:
        return "alpaca"
    raise DataError(
        f"{name} has the columns {', '.join(map(repr, columns))}; expected 'prompt', 'messages' or 'instruction', to which the "
        "adapter gives an answer. Rename the column."
    )


def _with_place(values: Mapping[str, object], name: str) -> dict[str, object]:
    """The values with a place for the answer; an answer that is there is replaced."""
    kind = _prompt_format(values, name)
    if kind == "alpaca":
        return {**values, "output": _ANSWER}
    if kind == "completion":
        given = values["prompt"]
        place: object = [{"role": "assistant", "content": _ANSWER}] if isinstance(given, list) else _ANSWER
        return {**{key: value for key, value in values.items() if key != "response"}, "completion": place}
    column = next(column for column in _CHATS if column in values)
    messages = values[column]
    if not isinstance(messages, list) or not messages:
        return dict(values)  # which is named as a row that cannot be used
    last = messages[-1]
    role = last.get("role", last.get("from")) if isinstance(last, dict) else None
    before = messages[:-1] if role in ("assistant", "gpt") else messages
    return {**values, column: [*before, {"role": "assistant", "content": _ANSWER}]}
