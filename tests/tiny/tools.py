"""A tool, a chat template that writes tools and calls, and a schema that makes any text a call."""

from __future__ import annotations

from typing import Any

WRITES_TOOLS = (
    "{% for tool in tools or [] %}{{ '[' + tool['function']['name'] + ']' }}{% endfor %}{% for m in messages %}"
    "{{ m['role'] + ': ' + m['content'] }}{% for call in m.tool_calls or [] %}{{ call['function'] | tojson }}{% endfor %}\n"
    "{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL_SCHEMA: dict[str, Any] = {  # a random model writes no call of its own accord: the schema makes its text one
    "type": "json_schema",
    "json_schema": {"name": "call", "schema": {
        "type": "object", "required": ["name", "arguments"], "additionalProperties": False,
        "properties": {"name": {"enum": ["weather"]}, "arguments": {
            "type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"], "additionalProperties": False}},
    }},
}  # fmt: skip
