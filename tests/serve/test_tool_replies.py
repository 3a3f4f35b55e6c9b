"""Tools in chat requests: which calls are read in what a model writes, and which requests are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorakeet.errors import ConfigError
from lorakeet.serve.request_fields import Fields
from lorakeet.serve.tool_replies import ToolCall, calls_in, tools_of

TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
ROME = ToolCall("weather", {"city": "Rome"})


@pytest.mark.parametrize(
    ("text", "rest", "calls"),
    [
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "", (ROME,)),
        ('I look.\n<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>', "I look.", (ROME,)),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' * 2, "", (ROME, ROME)),
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]', "", (ROME,)),
        ('{"name": "weather", "parameters": {"city": "Rome"}}', "", (ROME,)),
        ('<|python_tag|>{"name": "weather", "parameters": {}}', "", (ToolCall("weather", {}),)),
        ('{"name": "stocks", "parameters": {}}', None, ()),  # no tool of the request
        ('{"name": "weather", "parameters": [1]}', None, ()),
        ('<tool_call>{"name": "weather"</tool_call>', None, ()),
        ('{"city": "Rome"}', None, ()),
        ('{"name": ["weather"], "arguments": {}}', None, ()),
        ("<tool_call>" + " " * 200_000, None, ()),  # one pass, whatever a model repeats
        ("<tool_call>" * 50_000, None, ()),
        ("It is 31 degrees.", None, ()),
        ("[" * 50_000, None, ()),
    ],
)
def test_calls_are_read_and_other_text_stays(text: str, rest: str | None, calls: tuple[ToolCall, ...]) -> None:
    assert calls_in(text, TOOLS) == (text if rest is None else rest, calls)


def test_a_call_in_openais_form() -> None:
    found = ROME.as_openai()
    assert found["type"] == "function" and json.loads(found["function"]["arguments"]) == {"city": "Rome"}
    assert found["id"] != ROME.as_openai()["id"]


@pytest.mark.parametrize(
    ("request_data", "words"),
    [
        ({"tools": [{"type": "function"}]}, r"tools\[0\] has no function with a name"),
        ({"tools": "weather"}, "tools must be a list"),
        ({"tools": list(TOOLS) * 129}, "at most 128"),
        ({"tools": list(TOOLS), "tool_choice": "required"}, "takes auto or none"),
    ],
)
def test_requests_that_cannot_be(request_data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tools_of(Fields(request_data))


def test_tool_choice_none_leaves_them_out() -> None:
    assert tools_of(Fields({"tools": list(TOOLS), "tool_choice": "none"})) == () and tools_of(Fields({})) == ()
    assert tools_of(Fields({"tools": list(TOOLS), "tool_choice": "auto"})) == TOOLS
