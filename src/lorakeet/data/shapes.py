"""Turns records into rows: chat messages, prompt and completion, Alpaca, plain text, labelled texts, and what kinds add."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

from lorakeet.data.proposals.columns import SAMPLED, column_remedy, near_column, propose_answers, propose_columns
from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec, fill_template, template_fields
from lorakeet.data.tables import FileRecord, RowProblems, UnusableRow, separator_hint, separator_remedies
from lorakeet.data.tool_calls import message_extra, row_tools
from lorakeet.errors import DataError, Remedy, nearest, spelt
from lorakeet.registry import ANY, Objective, declarations, function_at

ROLES = ("system", "user", "assistant", "tool")
CHAT_COLUMNS = ("messages", "conversations")
COMPLETION_COLUMNS = (("prompt", "completion"), ("prompt", "response"))
_OTHER_ROLES = {
    "human": "user", "gpt": "assistant", "developer": "system", "function": "tool", "observation": "tool",
    "function_call": "assistant",
}  # fmt: skip  # ShareGPT's, and OpenAI's older and newer ones
_LABEL = "label"


class AddedShape:
    """A shape of rows that a kind of run brings, by its name in data.format (registry.KindDeclaration.shapes)."""

    columns: ClassVar[Mapping[str, str]] = {}  # that it reads, each with what it becomes
    expected: str = ""  # its columns in words, where those of a file fit no shape
    has: str = ""  # what one of its rows has, in words

    def fits(self, columns: Mapping[str, object], registered: Objective) -> bool:
        """Whether a record with these columns is of this shape, for what is trained."""
        raise NotImplementedError

    def needed(self, columns: Mapping[str, object]) -> dict[str, str]:
        """The columns that a record must have, each with what to do where it is missing."""
        raise NotImplementedError

    def turns(self, values: dict[str, object], spec: DataSpec) -> tuple[tuple[Turn, ...], tuple[Turn, ...], bool | None]:
        """The turns of a row, those with its other answer, and whether its answer is wanted. Raises UnusableRow."""
        raise NotImplementedError

    def is_of(self, row: Row) -> bool:
        """Whether a row was read in this shape."""
        raise NotImplementedError

    def note(self, name: str, row: Row, records: Sequence[Mapping[str, object]], registered: Objective) -> str:
        """A sentence on what was guessed or not read of the first records, the first of which became `row`; or empty."""
        return ""

    def part_notes(self, parts: Mapping[str, Sequence[Row]]) -> list[str]:
        """Sentences on rows of the named parts."""
        return []


def added_shapes() -> dict[str, AddedShape]:
    """The shapes that kinds bring, by name."""
    return {name: function_at(place) for one in declarations().values() for name, place in one.shapes.items()}


def shape_rows(
    records: Iterator[FileRecord], name: str, spec: DataSpec, problems: RowProblems, registered: Objective = ANY
) -> Iterator[Row]:
    """Yields the rows of the records; with format "auto" the first record decides the shape.

    Columns of no known shape end in a DataError that proposes some, by their names and what the first records hold.
    Of several shapes that fit, what is trained takes that of its rows. Raises DataError for a missing column; problems of
    single records are added to `problems`.
    """
    shape = ""
    for record in records:
        if not shape:
            shape = _find_shape(record, name, spec, registered, records)
            _require_columns(record, shape, name, spec, records)
        try:
            row = _shape(record, shape, spec)
            _require_length(row, spec)
            yield row
        except UnusableRow as error:
            problems.add(record.source, str(error))


def columns_used(record: FileRecord, name: str, spec: DataSpec, registered: Objective = ANY) -> tuple[str, dict[str, str]]:
    """The shape of a record, and the columns of it that are read, each with what it becomes. DataError as `shape_rows`."""
    shape = _find_shape(record, name, spec, registered, iter(()))
    _require_columns(record, shape, name, spec, iter(()))
    used: dict[str, str] = {}
    if shape == "classification":
        used = dict.fromkeys(template_fields(spec.template), "prompt")
        used = {spec.text_column if column == "text" else column: word for column, word in used.items()}
        used[spec.label_column or _LABEL] = "label"
    elif shape == "text":
        used[spec.text_column] = "text"
    else:
        chats = dict.fromkeys(CHAT_COLUMNS, "conversation")
        pairs = {prompt: "prompt" for prompt, _ in COMPLETION_COLUMNS} | {answer: "answer" for _, answer in COMPLETION_COLUMNS}
        used |= {
            "chat": {**chats, "tools": "tools"},
            "completion": pairs,
            "alpaca": {"instruction": "prompt", "input": "prompt", "output": "answer"},
            **{name: one.columns for name, one in added_shapes().items()},
        }[shape]
    if spec.group_column is not None:
        used[spec.group_column] = "group, kept on one side of the split"
    return shape, {column: word for column, word in used.items() if column in record.values}


def _require_length(row: Row, spec: DataSpec) -> None:
    length = len(row.tools) + max(sum(len(turn.text) + len(turn.extra) for turn in turns) for turns in (row.turns, row.rejected))
    if length > spec.longest_row:
        raise UnusableRow(
            f"the row has {length:,} characters; expected at most {spec.longest_row:,}. Split it, or raise "
            f"{spelt('data.longest_row')}."
        )


def _find_shape(
    record: FileRecord, name: str, spec: DataSpec, registered: Objective, following: Iterator[FileRecord]
) -> str:
    columns = record.values
    if spec.format != "auto":
        return str(spec.format)
    added = next((shape for shape, one in added_shapes().items() if one.fits(columns, registered)), "")
    plain = _plain_shape(columns, spec, registered)
    if found := (plain or added) if registered.one_answer else (added or plain):
        return found
    said = (
        f"{name}: the columns {_listed(columns)} match no known shape; expected 'messages', or 'prompt' and 'completion', "
        f"or 'instruction' and 'output', {''.join(one.expected for one in added_shapes().values())}or '{spec.text_column}'."
    )
    named = f"{spelt('data.text_column')} (and {spelt('data.label_column')} for labelled texts)"
    general = f"Name yours with {named}, or choose {spelt('data.format')}."
    if several := _separators(columns):
        raise DataError(f"{said} {general}{separator_hint(several)}", remedies=several)
    sample = [record, *islice(following, SAMPLED - 1)]
    proposal = propose_columns(sample, {"text": spec.text_column, "label": spec.label_column})
    words = [propose_answers(columns), proposal.words if proposal else "", general]
    values = {"file": name, "candidates": list(proposal.undecided) if proposal else []}
    message = " ".join([said, *filter(None, words)])
    raise DataError(message, code="columns-unclear", values=values, remedies=proposal.remedies if proposal else ())


def _plain_shape(columns: Mapping[str, object], spec: DataSpec, registered: Objective) -> str:
    """The shape of records that have one answer, or none; empty if they are of no known shape."""
    if registered.one_answer and spec.label_column is not None and all(each in columns for each in _classified_columns(spec)):
        return "classification"
    if any(column in columns for column in CHAT_COLUMNS):
        return "chat"
    if any(prompt in columns and answer in columns for prompt, answer in COMPLETION_COLUMNS):
        return "completion"
    if "instruction" in columns and "output" in columns:
        return "alpaca"
    if spec.label_column is not None or (spec.text_column in columns and _LABEL in columns):
        return "classification"
    return "text" if spec.text_column in columns else ""


def _classified_columns(spec: DataSpec) -> dict[str, str]:
    """The columns of labelled texts, each with what to do where it is missing."""
    fields = template_fields(spec.template)
    needed = {field: f"fix {spelt('data.template')}" for field in fields if field != "text"}
    needed[spec.label_column or _LABEL] = f"name it with {spelt('data.label_column')}"
    if "text" in fields:
        needed[spec.text_column] = f"name it with {spelt('data.text_column')}"
    return needed


def _require_columns(
    record: FileRecord, shape: str, name: str, spec: DataSpec, following: Iterator[FileRecord]
) -> None:
    columns = record.values
    needed: dict[str, str] = {}
    if shape == "chat" and not any(column in columns for column in CHAT_COLUMNS):
        needed["messages"] = "rename the column of the messages"
    if shape == "completion" and not any(p in columns and a in columns for p, a in COMPLETION_COLUMNS):
        needed |= dict.fromkeys(COMPLETION_COLUMNS[0], "rename the column")
    if shape == "alpaca":
        needed |= {"instruction": "rename the column", "output": "rename the column"}
    if added := added_shapes().get(shape):
        needed |= added.needed(columns)
    if shape == "text":
        needed[spec.text_column] = f"name it with {spelt('data.text_column')}"
    if shape == "classification":
        needed |= _classified_columns(spec)
    if spec.group_column is not None:
        needed[spec.group_column] = f"name it with {spelt('data.group_column')}"
    missing = {column: remedy for column, remedy in needed.items() if column not in columns}
    if not missing:
        return
    several = _separators(columns)
    remedies = several or _column_remedies([record, *islice(following, SAMPLED - 1)], missing, spec)
    flags = f" It may be: {' '.join(one.flag for one in remedies)}." if remedies and not several else ""
    lines = [
        f"{name} has no column '{column}'; it has {_listed(columns)}.{nearest(column, columns)} Otherwise {remedy}."
        f"{separator_hint(several)}"
        for column, remedy in missing.items()
    ]
    values = {"file": name, "candidates": []}
    raise DataError("\n".join(lines) + flags, code="columns-unclear", values=values, remedies=remedies)


def _column_remedies(sample: Sequence[FileRecord], missing: Mapping[str, str], spec: DataSpec) -> tuple[Remedy, ...]:
    """Settings for text and label columns that are missing: the nearest name, else what a proposal says."""
    columns = sample[0].values
    named = {"data.text_column": spec.text_column, "data.label_column": spec.label_column or _LABEL}
    near = {
        setting: found
        for setting, column in named.items()
        if column in missing and (found := near_column(column, columns)) is not None
    }
    given = {"text": near.get("data.text_column", spec.text_column), "label": near.get("data.label_column", spec.label_column)}
    proposal = propose_columns(sample, given)
    remedies = [column_remedy("text" if setting == "data.text_column" else "label", column) for setting, column in near.items()]
    others = proposal.remedies if proposal else ()
    return (*remedies, *(one for one in others if one.setting not in near and named[one.setting] in missing))


def _separators(columns: Mapping[str, object]) -> list[Remedy]:
    """What to set where one column has the names of several, since another separator was given."""
    only, *others = columns or [""]
    return [] if others else separator_remedies(only)


def _shape(record: FileRecord, shape: str, spec: DataSpec) -> Row:
    values = record.values
    label, tools, desirable = None, "", None
    rejected: tuple[Turn, ...] = ()
    added = added_shapes().get(shape)
    if shape == "chat" or added is not None:
        tools = row_tools(values)
    if added is not None:
        turns, rejected, desirable = added.turns(values, spec)
    elif shape == "chat":
        turns = _messages(_as_list(values.get(_chat_column(values))), spec)
    elif shape == "completion":
        turns = _completion(values, spec)
    elif shape == "alpaca":
        instruction, extra = column_text(values, "instruction", spec), column_text(values, "input", spec, may_be_empty=True)
        turns = _pair(f"{instruction}\n\n{extra}" if extra else instruction, column_text(values, "output", spec))
    elif shape == "classification":
        turns, label = _classification(values, spec)
    else:
        turns = (Turn("", column_text(values, spec.text_column, spec), supervised=True),)
    if spec.system and shape != "text" and turns[0].role != "system":
        first = Turn("system", spec.system, supervised=False)
        turns, rejected = (first, *turns), (first, *rejected) if rejected else ()
    group = None if spec.group_column is None else column_text(values, spec.group_column, spec)
    return Row(turns, label, group, record.source, tools, rejected, desirable)


def _chat_column(values: dict[str, object]) -> str:
    return next((column for column in CHAT_COLUMNS if column in values), CHAT_COLUMNS[0])


def message_turns(messages: list[Any], spec: DataSpec) -> tuple[Turn, ...]:
    """The turns of messages, of any role."""
    return tuple(_message(message, number, spec) for number, message in enumerate(messages, start=1))


def answer_turns(values: dict[str, object], spec: DataSpec) -> tuple[Turn, ...]:
    """The turns of a record with one answer: its messages, or prompt and completion."""
    column = _chat_column(values)
    return _messages(_as_list(values[column]), spec) if column in values else _completion(values, spec)


def _completion(values: dict[str, object], spec: DataSpec) -> tuple[Turn, ...]:
    prompt, answer = next(((p, a) for p, a in COMPLETION_COLUMNS if p in values and a in values), COMPLETION_COLUMNS[0])
    if isinstance(values.get(prompt), list) and isinstance(values.get(answer), list):
        return _messages([*_as_list(values[prompt]), *_as_list(values[answer])], spec)
    return _pair(column_text(values, prompt, spec), column_text(values, answer, spec))


def _classification(values: dict[str, object], spec: DataSpec) -> tuple[tuple[Turn, ...], str]:
    fields = template_fields(spec.template)
    filled: dict[str, str] = {}
    for field in fields:
        column = spec.text_column if field == "text" else field
        filled[field] = column_text(values, column, spec, may_be_empty=column != spec.text_column)
    # A template such as "{review}" uses the text column by its own name.
    free = "text" if "text" in fields else spec.text_column
    prompt, span = fill_template(spec.template, filled, free)
    if not prompt.strip():
        raise UnusableRow("the prompt is empty; remove the row or fill its columns.")
    label = column_text(values, spec.label_column or _LABEL, spec).strip()
    label = spec.rename_labels.get(label, label)
    if spec.labels and label not in spec.labels:
        known = ", ".join(map(repr, spec.labels))
        raise UnusableRow(f"label {label!r} is not one of data.labels ({known}).{nearest(label, spec.labels)}")
    question = Turn("user", prompt, supervised=False, free=span)
    return (question, Turn("assistant", label_text(label, spec), supervised=True)), label


def label_text(label: str, spec: DataSpec) -> str:
    """The answer of a label: the spec's label template, filled."""
    return fill_template(spec.label_template, {"label": label}, "label")[0]


def _pair(prompt: str, answer: str) -> tuple[Turn, ...]:
    return Turn("user", prompt, supervised=False), Turn("assistant", answer, supervised=True)


def _messages(messages: list[Any], spec: DataSpec) -> tuple[Turn, ...]:
    turns = message_turns(messages, spec)
    if not any(turn.supervised for turn in turns):
        raise UnusableRow("no message of the assistant, so nothing to train on; add one with the role 'assistant'.")
    return turns


def _message(message: object, number: int, spec: DataSpec) -> Turn:
    if not isinstance(message, dict):
        raise UnusableRow(f"message {number} is {type(message).__name__}; expected an object with 'role' and 'content'.")
    given = message.get("role", message.get("from"))
    role = _OTHER_ROLES.get(given, given) if isinstance(given, str) else given
    if role not in ROLES:
        guess = nearest(role, ROLES) if isinstance(role, str) else ""
        raise UnusableRow(f"message {number} has the role {role!r}; expected one of {', '.join(ROLES)}.{guess}")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(texts) != len(content):
            raise UnusableRow(f"message {number} has parts that are not text; expected text only.")
        content = "".join(texts)
    content = _clean(content, spec) if isinstance(content, str) else content
    extra = message_extra(message, role, content if given == "function_call" else None, number)
    if given == "function_call" or (extra and content is None):
        content = ""
    if not isinstance(content, str) or not (content.strip() or "tool_calls" in extra):
        raise UnusableRow(f"message {number} ({role}) has no text; remove it or fill its 'content'.")
    supervised = role == "assistant" and message.get("weight", 1) != 0
    return Turn(role, content, supervised, extra=json.dumps(extra, ensure_ascii=False) if extra else "")


def _as_list(value: object) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    raise UnusableRow(f"expected a list of messages, got {str(value)[:60]!r}.")


def column_text(values: dict[str, object], column: str, spec: DataSpec, may_be_empty: bool = False) -> str:
    """The text of a column. Raises UnusableRow for a value that is none, or an empty one."""
    value = values.get(column)
    if value is not None and not isinstance(value, (str, int, float)):
        raise UnusableRow(f"column '{column}' has a value of type {type(value).__name__}; expected text.")
    absent = value is None or (isinstance(value, float) and math.isnan(value))  # numeric tables have NaN for a missing value
    text = "" if absent else _clean(str(value), spec)
    if not text.strip() and not may_be_empty:
        raise UnusableRow(f"column '{column}' is empty; remove the row or fill it.")
    return text


def _clean(text: str, spec: DataSpec) -> str:
    if spec.html_unescape:
        text = html.unescape(text)
    if spec.strip_quotes and len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can escape a lone surrogate, which no tokenizer accepts.
        raise UnusableRow(
            f"the text has half of a character at position {error.start}; fix its escapes or remove the row."
        ) from error
    return text


def _listed(columns: dict[str, object]) -> str:
    return ", ".join(repr(column) for column in columns)
