"""Tool calls in conversations: what OpenAI's and ShareGPT's files say of them, in the form that chat templates read.

Calls and descriptions of functions are kept as JSON text, so that rows are hashable.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakeet.data.rows import Row
from lorakeet.data.tables import UnusableRow
from lorakeet.errors import DataError

_DEEPEST = 100  # levels of objects and lists within a call or a description


def message_extra(message: dict[Any, Any], role: str, function_call: object, number: int) -> dict[str, Any]:
    """The keys of a message that only chat templates read: tool_calls with their arguments as objects; tool_call_id and name."""
    calls = message.get("tool_calls") or []
    for one in (message.get("function_call"), function_call):  # OpenAI's older key, and ShareGPT's turn of its own
        if one:
            calls = [{"type": "function", "function": _object(one, f"message {number}: function_call")}]
    if not isinstance(calls, list):
        raise UnusableRow(f"message {number} has tool_calls of type {type(calls).__name__}; expected a list of calls.")
    if calls and role != "assistant":
        raise UnusableRow(f"message {number} ({role}) has tool_calls; only those of the assistant are calls.")
    keys = ("tool_call_id", "name") if role == "tool" else ()
    found: dict[str, Any] = {key: message[key] for key in keys if isinstance(message.get(key), str)}
    if calls:
        found["tool_calls"] = [_call(call, number) for call in calls]
    _require_plain(found, f"message {number}")
    return found


def _call(call: object, number: int) -> dict[str, Any]:
    what = f"message {number}: a tool call"
    function = _object(call, what)
    function = _object(function.get("function", function), what)
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise UnusableRow(f"{what} has no name; expected {{'function': {{'name': …, 'arguments': …}}}}.")
    if isinstance(arguments, str):
        arguments = _object(arguments or "{}", f"{what}, {name}: its arguments")
    kept = {key: value for key, value in _object(call, what).items() if key == "id"}
    return {**kept, "type": "function", "function": {"name": name, "arguments": arguments}}


def row_tools(values: dict[str, object]) -> str:
    """The row's `tools` (or OpenAI's older `functions`), as JSON text; empty if it has none."""
    tools = values.get("tools") or []
    tools = _json_list(tools) if isinstance(tools, str) else tools
    functions = values.get("functions")
    if functions and not tools:
        tools = [{"type": "function", "function": each} for each in _json_list(functions)]
    listed: list[Any] = tools if isinstance(tools, list) else [None]
    if not all(isinstance(each, dict) and isinstance(each.get("function", each), dict) for each in listed):
        raise UnusableRow("'tools' is no list of objects; expected descriptions of functions, as OpenAI's API takes them.")
    _require_plain(tools, "'tools'")
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def _require_plain(value: object, what: str, level: int = 0) -> None:
    """Raises UnusableRow for what no template can write: values nested too deep, and halves of characters."""
    if level > _DEEPEST:
        raise UnusableRow(f"{what} is nested deeper than {_DEEPEST} levels; simplify it or remove the row.")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise UnusableRow(f"{what} has half of a character; fix its escapes or remove the row.") from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            _require_plain(key, what, level)
            _require_plain(inner, what, level + 1)
    elif isinstance(value, list):
        for inner in value:
            _require_plain(inner, what, level + 1)


def _value(given: object) -> Any:
    """What is given, or the value of a JSON text; None for a broken one."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        return None


def _json_list(value: object) -> list[Any]:
    found = _value(value)
    if not isinstance(found, list):
        raise UnusableRow(f"expected a list of functions, got {str(value)[:60]!r}.")
    return found


def _object(value: object, what: str) -> dict[str, Any]:
    """The object, or that in a JSON text."""
    found = _value(value)
    if not isinstance(found, dict):
        raise UnusableRow(f"{what} is {str(value)[:60]!r}; expected an object, or one as JSON text.")
    return found


def require_written(row: Row, rendered: Callable[[Row], str]) -> None:
    """Raises DataError if the chat template, as `rendered` applies it, leaves out a tool or a call.

    A name may also be a word of the conversation, so it is the row with renamed functions that is rendered.
    """
    messages = [json.loads(turn.extra) for turn in row.turns if turn.extra]
    tools = json.loads(row.tools) if row.tools else []
    names = dict.fromkeys(map(_name, _functions(messages, tools)))
    if not names:
        return
    marks = {name: f"lorakeet_{number}_function" for number, name in enumerate(names)}
    marked = rendered(_renamed(row, marks))
    if left_out := [name for name, mark in marks.items() if mark not in marked]:
        missing = ", ".join(map(repr, left_out))
        raise DataError(
            f"{row.source}: the chat template leaves out {missing}: it does not write tools or tool calls. Use a model whose "
            "template does, or remove them."
        )


def unwritten(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], text: str) -> list[str]:
    """The names of called and described functions that are not in the text that a chat template made of them."""
    return list(dict.fromkeys(name for name in map(_name, _functions(messages, tools)) if name not in text))


def _functions(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The functions that are called, and those that are described."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    return [*calls, *(tool.get("function", tool) for tool in tools)]


def _name(function: Mapping[str, Any]) -> str:
    return str(function.get("name", ""))


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
    """The row with other names of its functions."""
    tools, extras = json.loads(row.tools or "[]"), [json.loads(turn.extra or "{}") for turn in row.turns]
    for function in _functions(extras, tools):
        function["name"] = names[_name(function)]
    for extra in extras:
        if extra.get("name") in names:  # of a result
            extra["name"] = names[extra["name"]]
    turns = [
        replace(turn, extra=json.dumps(extra, ensure_ascii=False) if extra else "")
        for turn, extra in zip(row.turns, extras, strict=True)
    ]
    return replace(row, turns=tuple(turns), tools=json.dumps(tools, ensure_ascii=False) if tools else "")
