"""Tools in chat requests: what a request says of them, and the calls that a model has written, in the spellings of its family.

Read are <tool_call>{…}</tool_call> (Qwen, Hermes), [TOOL_CALLS] [{…}] (Mistral), and replies that are one JSON call or a list of
calls (Llama 3.1 and later, with "parameters" for "arguments").
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakeet.errors import ConfigError
from lorakeet.serve.request_fields import Fields

MOST_TOOLS = 128
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PREFIXES = ("<|python_tag|>", "[TOOL_CALLS]")


@dataclass(frozen=True)
class ToolCall:
    """A call that a model has written; `arguments` is an object."""

    name: str
    arguments: dict[str, Any]

    def as_openai(self) -> dict[str, Any]:
        """As OpenAI's API writes it, with an id of its own and the arguments as text."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def tools_of(fields: Fields) -> tuple[dict[str, Any], ...]:
    """The tools of a request, none if tool_choice is "none". Raises ConfigError for anything but functions with names."""
    given, choice = fields.data.get("tools") or [], fields.data.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise ConfigError(f"tool_choice is {str(choice)[:60]!r}; this server takes auto or none: it cannot force a call.")
    if not isinstance(given, list) or len(given) > MOST_TOOLS:
        raise ConfigError(f"tools must be a list of at most {MOST_TOOLS} functions.")
    for number, tool in enumerate(given):
        function = Fields(tool, f"tools[{number}]").inner("function")
        if not function.text("name", ""):
            raise ConfigError(f"tools[{number}] has no function with a name; expected {{type: function, function: {{name, …}}}}.")
    return () if choice == "none" else tuple(given)


def calls_in(text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, tuple[ToolCall, ...]]:
    """The text without calls, and the calls of `tools` in it. A text in which any call is broken or unknown stays as it is."""
    names = {str(tool["function"]["name"]) for tool in tools}
    rest, tagged = _tagged(text)
    found = [_call(part, names) for part in tagged] if tagged else _whole(text, names)
    if not found or any(call is None for call in found):
        return text, ()
    return rest if tagged else "", tuple(call for call in found if call is not None)


def _tagged(text: str) -> tuple[str, list[str]]:
    """The text without what stands in tags, and what stands in each; in one pass, whatever a model repeats."""
    kept, found, position = [], [], 0
    while (start := text.find(_OPEN, position)) >= 0 and (end := text.find(_CLOSE, start)) >= 0:
        kept.append(text[position:start])
        found.append(text[start + len(_OPEN) : end].strip())
        position = end + len(_CLOSE)
    return "".join([*kept, text[position:]]).strip(), found


def _whole(text: str, names: set[str]) -> list[ToolCall | None]:
    """The calls of a reply that is nothing else."""
    bare = text.strip()
    for prefix in _PREFIXES:
        bare = bare.removeprefix(prefix).strip()
    if not bare.startswith(("{", "[")):
        return []
    try:
        value = json.loads(bare)
    except (ValueError, RecursionError):
        return []
    return [_call(part, names) for part in (value if isinstance(value, list) else [value])]


def _call(part: Any, names: set[str]) -> ToolCall | None:
    try:
        value = json.loads(part) if isinstance(part, str) else part
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return None
    name = value.get("name")
    return ToolCall(name, arguments) if isinstance(name, str) and name in names and isinstance(arguments, dict) else None
