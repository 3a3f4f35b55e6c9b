"""Rows without an answer, for a model to give one: the shape of each record, and a place for the answer that nothing reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakeet.data.proposals.columns import column_remedy, near_column, propose_columns
from lorakeet.data.rows import Row
from lorakeet.data.shapes import shape_rows
from lorakeet.data.spec import DataSpec, template_fields
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.errors import DataError, spelt

_ANSWER = "a"  # stands where the answer will
_CHATS = ("messages", "conversations")


def fitting_columns(first: Sequence[FileRecord], name: str, spec: DataSpec, labels: Sequence[str]) -> tuple[DataSpec, str]:
    """The settings that read these records, and a sentence on a column that is taken for another; empty if none is.

    A text column whose name differs in case only is taken, if it is the only one. DataError for one that none has.
    """
    columns = list(dict.fromkeys(column for record in first for column in record.values))
    if not labels:
        if not _prompt_format(columns):
            raise DataError(
                f"{name} has the columns {_listed(columns)}; expected 'prompt', 'messages' or 'instruction', to which the "
                "adapter gives an answer. Rename the column."
            )
        return spec, ""
    missing = [column for column in _template_columns(spec) if column not in columns]
    if not missing:
        return spec, ""
    text_alone = missing == [spec.text_column]
    same = [column for column in columns if text_alone and column.casefold() == spec.text_column.casefold()]
    if len(same) == 1:
        said = f"Column {same[0]!r} is taken for {spec.text_column!r}, as it was called in training."
        return replace(spec, text_column=same[0]), said
    proposal = propose_columns(first, {"text": None, "label": None})
    near = near_column(missing[0], columns) if text_alone else None
    found = near or (proposal.text if proposal else None)
    said = f"{name} has no column {_listed(missing)}, which the run was trained on; it has {_listed(columns)}."
    if len(same) > 1:
        raise DataError(f"{said} {_listed(same)} differ in case only: set {spelt('text-column')} to the one that is meant.")
    if found is None or not text_alone:
        raise DataError(f"{said} Rename the columns, or add them.")
    advice = f"If {found!r} is the text, set {spelt('text-column', found)}."
    raise DataError(f"{said} {advice}", remedies=[column_remedy("text", found)])


def row_shaper(name: str, spec: DataSpec, labels: Sequence[str], problems: RowProblems) -> Callable[[FileRecord], Row | None]:
    """A function that makes a row of a record, whose answer is a place holder; None, and a problem, for one without text.

    Other columns of the template that a record lacks are empty, as in training.
    """
    spec = replace(spec, group_column=None, labels=())
    fields = _template_columns(spec)
    needed = [spec.text_column] if spec.text_column in fields else fields

    def shaped(record: FileRecord) -> Row | None:
        if labels:
            wanted = "" if any(column in record.values for column in needed) else _listed(needed)
            values = {**dict.fromkeys(fields), **record.values, spec.label_column or "label": labels[0]}
            own = replace(spec, format="classification")
        else:
            kind = _prompt_format(record.values)
            wanted = "" if kind else "'prompt', 'messages' or 'instruction'"
            values, own = _with_place(record.values, kind), replace(spec, format=kind or "auto")
        if wanted:
            problems.add(record.source, f"no column {wanted}; the row has {_listed(record.values) or 'no columns'}.")
            return None
        return next(shape_rows(iter([FileRecord(record.source, values)]), name, own, problems), None)

    return shaped


def _template_columns(spec: DataSpec) -> list[str]:
    return [spec.text_column if field == "text" else field for field in template_fields(spec.template)]


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(map(repr, columns))


def _prompt_format(columns: Collection[str]) -> Any:
    """The format of prompts that have these columns; empty for none."""
    if any(column in columns for column in _CHATS):
        return "chat"
    if "prompt" in columns:
        return "completion"
    return "alpaca" if "instruction" in columns else ""


def _with_place(values: Mapping[str, object], kind: str) -> dict[str, object]:
    """The values with a place for the answer; an answer that is there is replaced."""
    if not kind:
        return dict(values)
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
