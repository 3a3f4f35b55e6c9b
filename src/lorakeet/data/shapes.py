"""Turns records into rows: chat messages, prompt and completion, Alpaca, plain text, and labelled texts."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator
from typing import Any

from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec, fill_template, template_fields
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.errors import DataError, nearest

ROLES = ("system", "user", "assistant", "tool")
_CHAT_COLUMNS = ("messages", "conversations")
_COMPLETION_COLUMNS = (("prompt", "completion"), ("prompt", "response"))
_OTHER_ROLES = {
    "human": "user", "gpt": "assistant", "developer": "system", "function": "tool", "observation": "tool",
    "function_call": "assistant",
}  # fmt: skip  # ShareGPT's, and OpenAI's older and newer ones
_LABEL = "label"


class _Unusable(Exception):
    """Says why one record cannot become a row; caught in this file."""


def shape_rows(records: Iterator[FileRecord], name: str, spec: DataSpec, problems: RowProblems) -> Iterator[Row]:
    """Yields the rows of the records; with format "auto" the first record decides the shape.

    Raises DataError for a missing column; problems of single records are added to `problems`.
    """
    shape = ""
    for record in records:
        if not shape:
            shape = _find_shape(record, name, spec)
            _require_columns(record, shape, name, spec)
        try:
            yield _shape(record, shape, spec)
        except _Unusable as error:
            problems.add(record.source, str(error))


def _find_shape(record: FileRecord, name: str, spec: DataSpec) -> str:
    columns = record.values
    if spec.format != "auto":
        return spec.format
    if any(column in columns for column in _CHAT_COLUMNS):
        return "chat"
    if any(prompt in columns and answer in columns for prompt, answer in _COMPLETION_COLUMNS):
        return "completion"
    if "instruction" in columns and "output" in columns:
        return "alpaca"
    if spec.label_column is not None or (spec.text_column in columns and _LABEL in columns):
        return "classification"
    if spec.text_column in columns:
        return "text"
    raise DataError(
        f"{name}: the columns {_listed(columns)} match no known shape; expected 'messages', or 'prompt' and 'completion', "
        f"or 'instruction' and 'output', or '{spec.text_column}'. Name yours with --data.text_column "
        f"(and --data.label_column for labelled texts), or choose --data.format."
    )


def _require_columns(record: FileRecord, shape: str, name: str, spec: DataSpec) -> None:
    columns = record.values
    needed: dict[str, str] = {}
    if shape == "chat" and not any(column in columns for column in _CHAT_COLUMNS):
        needed["messages"] = "rename the column of the messages"
    if shape == "completion" and not any(p in columns and a in columns for p, a in _COMPLETION_COLUMNS):
        needed |= dict.fromkeys(_COMPLETION_COLUMNS[0], "rename the column")
    if shape == "alpaca":
        needed |= {"instruction": "rename the column", "output": "rename the column"}
    if shape == "text":
        needed[spec.text_column] = "name it with --data.text_column"
    if shape == "classification":
        needed |= {field: "fix --data.template" for field in template_fields(spec.template) if field != "text"}
        needed[spec.label_column or _LABEL] = "name it with --data.label_column"
        if "text" in template_fields(spec.template):
            needed[spec.text_column] = "name it with --data.text_column"
    if spec.group_column is not None:
        needed[spec.group_column] = "name it with --data.group_column"
    missing = [
        f"{name} has no column '{column}'; it has {_listed(columns)}.{nearest(column, columns)} Otherwise {remedy}."
        for column, remedy in needed.items()
        if column not in columns
    ]
    if missing:
        raise DataError("\n".join(missing))


def _shape(record: FileRecord, shape: str, spec: DataSpec) -> Row:
    values = record.values
    label, tools = None, ""
    if shape == "chat":
        tools = _tools(values)
        column = next((column for column in _CHAT_COLUMNS if column in values), _CHAT_COLUMNS[0])
        turns = _messages(_as_list(values.get(column)), spec)
    elif shape == "completion":
        turns = _completion(values, spec)
    elif shape == "alpaca":
        instruction, extra = _text(values, "instruction", spec), _text(values, "input", spec, may_be_empty=True)
        turns = _pair(f"{instruction}\n\n{extra}" if extra else instruction, _text(values, "output", spec))
    elif shape == "classification":
        turns, label = _classification(values, spec)
    else:
        turns = (Turn("", _text(values, spec.text_column, spec), supervised=True),)
    if spec.system and shape != "text" and turns[0].role != "system":
        turns = (Turn("system", spec.system, supervised=False), *turns)
    group = None if spec.group_column is None else _text(values, spec.group_column, spec)
    return Row(turns, label, group, record.source, tools)


def _completion(values: dict[str, object], spec: DataSpec) -> tuple[Turn, ...]:
    prompt, answer = next(((p, a) for p, a in _COMPLETION_COLUMNS if p in values and a in values), _COMPLETION_COLUMNS[0])
    if isinstance(values.get(prompt), list) and isinstance(values.get(answer), list):
        return _messages([*_as_list(values[prompt]), *_as_list(values[answer])], spec)
    return _pair(_text(values, prompt, spec), _text(values, answer, spec))


def _classification(values: dict[str, object], spec: DataSpec) -> tuple[tuple[Turn, ...], str]:
    fields = template_fields(spec.template)
    filled: dict[str, str] = {}
    for field in fields:
        column = spec.text_column if field == "text" else field
        filled[field] = _text(values, column, spec, may_be_empty=column != spec.text_column)
    # A template such as "{review}" uses the text column by its own name.
    free = "text" if "text" in fields else spec.text_column
    prompt, span = fill_template(spec.template, filled, free)
    if not prompt.strip():
        raise _Unusable("the prompt is empty; remove the row or fill its columns.")
    label = _text(values, spec.label_column or _LABEL, spec).strip()
    if spec.labels and label not in spec.labels:
        known = ", ".join(map(repr, spec.labels))
        raise _Unusable(f"label {label!r} is not one of data.labels ({known}).{nearest(label, spec.labels)}")
    question = Turn("user", prompt, supervised=False, free=span)
    return (question, Turn("assistant", label_text(label, spec), supervised=True)), label


def label_text(label: str, spec: DataSpec) -> str:
    """The answer of a label: the spec's label template, filled."""
    return fill_template(spec.label_template, {"label": label}, "label")[0]


def _pair(prompt: str, answer: str) -> tuple[Turn, ...]:
    return Turn("user", prompt, supervised=False), Turn("assistant", answer, supervised=True)


def _messages(messages: list[Any], spec: DataSpec) -> tuple[Turn, ...]:
    turns = tuple(_message(message, number, spec) for number, message in enumerate(messages, start=1))
    if not any(turn.supervised for turn in turns):
        raise _Unusable("no message of the assistant, so nothing to train on; add one with the role 'assistant'.")
    return turns


def _message(message: object, number: int, spec: DataSpec) -> Turn:
    if not isinstance(message, dict):
        raise _Unusable(f"message {number} is {type(message).__name__}; expected an object with 'role' and 'content'.")
    given = message.get("role", message.get("from"))
    role = _OTHER_ROLES.get(given, given) if isinstance(given, str) else given
    if role not in ROLES:
        guess = nearest(role, ROLES) if isinstance(role, str) else ""
        raise _Unusable(f"message {number} has the role {role!r}; expected one of {', '.join(ROLES)}.{guess}")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(texts) != len(content):
            raise _Unusable(f"message {number} has parts that are not text; expected text only.")
        content = "".join(texts)
    content = _clean(content, spec) if isinstance(content, str) else content
    extra = _extra(message, role, content if given == "function_call" else None, number)
    if given == "function_call" or (extra and content is None):
        content = ""
    if not isinstance(content, str) or not (content.strip() or "tool_calls" in extra):
        raise _Unusable(f"message {number} ({role}) has no text; remove it or fill its 'content'.")
    supervised = role == "assistant" and message.get("weight", 1) != 0
    return Turn(role, content, supervised, extra=json.dumps(extra, ensure_ascii=False) if extra else "")


def _extra(message: dict[Any, Any], role: str, function_call: object, number: int) -> dict[str, Any]:
    """The keys of a message that only chat templates read: tool_calls with their arguments as objects; tool_call_id and name."""
    calls = message.get("tool_calls") or []
    for one in (message.get("function_call"), function_call):  # OpenAI's older key, and ShareGPT's turn of its own
        if one:
            calls = [{"type": "function", "function": _object(one, f"message {number}: function_call")}]
    if not isinstance(calls, list):
        raise _Unusable(f"message {number} has tool_calls of type {type(calls).__name__}; expected a list of calls.")
    keys = ("tool_call_id", "name") if role == "tool" else ()
    found: dict[str, Any] = {key: message[key] for key in keys if isinstance(message.get(key), str)}
    if calls and role == "assistant":
        found["tool_calls"] = [_call(call, number) for call in calls]
    return found


def _call(call: object, number: int) -> dict[str, Any]:
    what = f"message {number}: a tool call"
    function = _object(call, what)
    function = _object(function.get("function", function), what)
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise _Unusable(f"{what} has no name; expected {{'function': {{'name': …, 'arguments': …}}}}.")
    if isinstance(arguments, str):
        arguments = _object(arguments or "{}", f"{what}, {name}: its arguments")
    kept = {key: value for key, value in _object(call, what).items() if key == "id"}
    return {**kept, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(values: dict[str, object]) -> str:
    """The row's `tools` (or OpenAI's older `functions`), as JSON text; empty if it has none."""
    tools = values.get("tools") or []
    tools = _json_list(tools) if isinstance(tools, str) else tools
    functions = values.get("functions")
    if functions and not tools:
        tools = [{"type": "function", "function": each} for each in _json_list(functions)]
    if not isinstance(tools, list) or not all(isinstance(each, dict) for each in tools):
        raise _Unusable("'tools' is no list of objects; expected descriptions of functions, as OpenAI's API takes them.")
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def _json_list(value: object) -> list[Any]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise _Unusable(f"expected a list of functions, got {str(value)[:60]!r}.")
    return found


def _object(value: object, what: str) -> dict[str, Any]:
    """The object, or that in a JSON text."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _Unusable(f"{what} is {str(value)[:60]!r}; expected an object, or one as JSON text.")
    return found


def _as_list(value: object) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    raise _Unusable(f"expected a list of messages, got {str(value)[:60]!r}.")


def _text(values: dict[str, object], column: str, spec: DataSpec, may_be_empty: bool = False) -> str:
    value = values.get(column)
    if value is not None and not isinstance(value, (str, int, float)):
        raise _Unusable(f"column '{column}' has a value of type {type(value).__name__}; expected text.")
    absent = value is None or (isinstance(value, float) and math.isnan(value))  # numeric tables have NaN for a missing value
    text = "" if absent else _clean(str(value), spec)
    if not text.strip() and not may_be_empty:
        raise _Unusable(f"column '{column}' is empty; remove the row or fill it.")
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
        raise _Unusable(
            f"the text has half of a character at position {error.start}; fix its escapes or remove the row."
        ) from error
    return text


def _listed(columns: dict[str, object]) -> str:
    return ", ".join(repr(column) for column in columns)
