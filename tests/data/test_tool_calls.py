"""Rows with tools: several vendors' spellings of one conversation, what is trained on, and what a template must write."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakeet.data.chat import Encoder
from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError
from tiny.damage import other_json
from tiny.fuzz import fuzzed
from tiny.runs import write_rows

WRITES_TOOLS = (
    "{% if tools %}{{ '<|start|>system\n' + tools | tojson + '<|end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call['function'] | tojson + '</call>' }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
OPENAI = {
    "messages": [
        {"role": "user", "content": "Is it hot in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "31 degrees"},
        {"role": "assistant", "content": "Yes, 31 degrees."},
    ],
    "tools": [TOOL],
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Is it hot in Rome?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "31 degrees"},
        {"from": "gpt", "value": "Yes, 31 degrees."},
    ],
    "tools": json.dumps([TOOL]),
}
OLDER = {
    "messages": [
        {"role": "user", "content": "Is it hot in Rome?"},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
        {"role": "function", "name": "weather", "content": "31 degrees"},
        {"role": "assistant", "content": "Yes, 31 degrees."},
    ],
    "functions": [TOOL["function"]],
}


def encoded(record: dict[str, Any], tokenizer: Any, folder: Path) -> tuple[str, list[str]]:
    """The whole text of the row, and its target parts."""
    (row,) = read_rows(str(write_rows(folder / "rows.jsonl", [record])), DataSpec(train="rows.jsonl"))
    example = Encoder(tokenizer, DataSpec(train="rows.jsonl")).encode(row)
    assert example is not None

    def text(ids: Any) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    targets, part = [], []
    for token, target in zip(example.ids.tolist(), example.supervised.tolist(), strict=True):
        if target:
            part.append(token)
        elif part:
            targets.append(text(part))
            part = []
    return text(example.ids), [*targets, *([text(part)] if part else [])]


@pytest.mark.parametrize("record", [OPENAI, SHAREGPT, OLDER], ids=["openai", "sharegpt", "older"])
def test_calls_and_answers_are_trained_and_tools_and_results_are_not(
    record: dict[str, Any], byte_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    whole, targets = encoded(record, byte_tokenizer(WRITES_TOOLS), tmp_path)
    assert targets == ['<call>{"name": "weather", "arguments": {"city": "Rome"}}</call><|end|>', "Yes, 31 degrees.<|end|>"]
    parts = ('"description": "Of a city."', "Is it hot", "<|start|>tool\n31 degrees<|end|>\n<|start|>assistant")
    assert [whole.index(part) for part in parts] == sorted(whole.index(part) for part in parts)


def test_a_weight_of_zero_is_no_target(byte_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    record = json.loads(json.dumps(OPENAI))
    record["messages"][1]["weight"] = 0
    assert encoded(record, byte_tokenizer(WRITES_TOOLS), tmp_path)[1] == ["Yes, 31 degrees.<|end|>"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("default", r"rows.jsonl:1: the chat template leaves out 'weather'"),
        (None, r"rows.jsonl:1: the row has tools or tool calls, which only a chat template can write"),
    ],
)
def test_a_template_that_does_not_write_them_is_refused(
    template: str | None, words: str, byte_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        encoded(OPENAI, byte_tokenizer() if template else byte_tokenizer(None), tmp_path)


@pytest.mark.parametrize("record", [OPENAI, SHAREGPT, OLDER], ids=["openai", "sharegpt", "older"])
def test_a_name_that_is_also_a_word_of_the_conversation_is_no_call(
    record: dict[str, Any], byte_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    said = json.loads(json.dumps(record).replace("Is it hot in Rome?", "Is the weather hot in Rome?"))
    with pytest.raises(DataError, match="the chat template leaves out 'weather': it does not write tools or tool calls"):
        encoded(said, byte_tokenizer(), tmp_path)
    assert len(encoded(said, byte_tokenizer(WRITES_TOOLS), tmp_path)[1]) == 2


def test_rows_with_tools_are_never_sent_to_raw_text(byte_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    """It refuses them too."""
    refuses = WRITES_TOOLS.replace("{% for m", "{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}{% for m", 1)
    upper = WRITES_TOOLS.replace("m['content']", "m['content'] | upper")
    for template, words in ((refuses, "refuses the turns"), (upper, "changes turn 4")):
        with pytest.raises(DataError, match=rf"{words}.*or remove the row\.$"):
            encoded(OPENAI, byte_tokenizer(template), tmp_path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"function": {"name": "", "arguments": {}}}, "a tool call has no name"),
        ({"function": {"name": "f", "arguments": "[1]"}}, r"a tool call, f: its arguments is '\[1\]'; expected an object"),
        ("f(1)", "a tool call is 'f\\(1\\)'; expected an object"),
    ],
)
def test_calls_that_cannot_be(call: Any, words: str, tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    with pytest.raises(DataError, match=words):
        list(read_rows(str(write_rows(tmp_path / "rows.jsonl", [record])), DataSpec(train="rows.jsonl")))


def test_rows_with_other_calls_are_other_rows(tmp_path: Path) -> None:
    other = json.loads(json.dumps(OPENAI).replace("Rome", "Oslo").replace("in Oslo?", "in Rome?"))
    rows = list(read_rows(str(write_rows(tmp_path / "rows.jsonl", [OPENAI, other, OPENAI])), DataSpec(train="rows.jsonl")))
    assert rows[0].key == rows[2].key != rows[1].key


def test_the_end_of_the_turn_is_a_target_also_behind_a_call_that_ends_in_an_added_token(
    byte_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    """As Qwen's and Hermes' tokenizers, whose </tool_call> is longer than the end of the turn."""
    tokenizer = byte_tokenizer(WRITES_TOOLS.replace("<call>", "<tool_call>").replace("</call>", "</tool_call>"))
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    targets = encoded(OPENAI, tokenizer, tmp_path)[1]
    assert targets[0].endswith("</tool_call><|end|>") and targets[0].startswith("<tool_call>")


def test_tools_that_are_no_functions_are_named(tmp_path: Path) -> None:
    record = {**OPENAI, "tools": [{"type": "function", "function": "f"}]}
    with pytest.raises(DataError, match="'tools' is no list of objects"):
        list(read_rows(str(write_rows(tmp_path / "rows.jsonl", [record])), DataSpec(train="rows.jsonl")))


def nested(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(levels):
        found = {"a": found}
    return found


def with_call(call: Any) -> dict[str, Any]:
    return {"messages": [OPENAI["messages"][0], {"role": "assistant", "content": "", "function_call": call}]}


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (with_call(DEEP), "expected an object"),
        ({**OPENAI, "tools": DEEP}, r"expected a list of functions|no list of objects"),
        ({**OLDER, "functions": DEEP}, "expected a list of functions"),
        (with_call({**CALL["function"], "arguments": json.dumps(nested(200))}), "message 2 is nested deeper than 100 levels"),
        ({**OPENAI, "tools": [{"function": {"name": "f", "parameters": nested(200)}}]}, "'tools' is nested deeper than 100"),
        ({**OPENAI, "tools": [{"function": {"name": "f\ud800"}}]}, "'tools' has half of a character"),
    ],
)  # fmt: skip
def test_calls_that_no_template_can_write_are_named(record: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read_rows(str(write_rows(tmp_path / "rows.jsonl", [record])), DataSpec(train="rows.jsonl"))


@pytest.mark.slow
@fuzzed(quick=200, many=20_000)
@given(text=st.sampled_from([OPENAI, SHAREGPT, OLDER]).flatmap(other_json))
def test_any_row_with_tools_is_encoded_or_one_message(
    text: bytes, byte_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "tools.jsonl"
    file.write_bytes(text.replace(b"\n", b" ") + b"\n")
    with contextlib.suppress(DataError):
        spec = DataSpec(train="rows.jsonl")
        for row in read_rows(str(file), spec):
            Encoder(byte_tokenizer(WRITES_TOOLS), spec).encode(row)
