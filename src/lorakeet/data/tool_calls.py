"""Tool calls in conversations: what OpenAI's and ShareGPT's files say of them, in the form that chat templates read.

Calls and descriptions of functions are kept as JSON text, so that rows are hashable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorakeet.data.rows import Row
from lorakeet.data.tables import UnusableRow
from lorakeet.errors import DataError


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
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def _value(given: object) -> Any:
    """What is given, or the value of a JSON text; None for a broken one."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
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


def require_written(row: Row, text: str) -> None:
    """Raises DataError if the chat template has left out a tool or a call."""
    messages = [json.loads(turn.extra) for turn in row.turns if turn.extra]
    if left_out := unwritten(messages, json.loads(row.tools) if row.tools else [], text):
        missing = ", ".join(map(repr, left_out))
        raise DataError(
            f"{row.source}: the chat template leaves out {missing}: it does not write tools or tool calls. Use a model whose "
            "template does, or remove them."
        )


def unwritten(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], text: str) -> list[str]:
    """The names of called and described functions that are not in the text that a chat template made of them."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    names = [str(each.get("name", "")) for each in (*calls, *(tool.get("function", tool) for tool in tools))]
    return list(dict.fromkeys(name for name in names if name not in text))
