"""The supervised places of many kinds of chat template: the answer's text and the token that ends the turn."""

from collections.abc import Callable
from typing import Any

import pytest
from jinja2 import TemplateError, UndefinedError

from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.data.template import (
    TemplateRefused,
    decoded,
    encoded,
    end_of_turn_tokens,
    render,
    templated,
    tokenised,
    uses_template,
)
from lorakeet.errors import ConfigError, DataError

TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}"
)
INST = (  # as Mistral's: no generation prompt, a space before the answer, no system prompt
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
CLOSED = (  # as Phi-3's: another token ends the whole conversation
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (  # as Qwen3's: the last answer gets an empty block of thoughts
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
OPENED = (  # as some reasoning models': the generation prompt opens thoughts that no history shows
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}{% endif %}"
)
MOVED = (  # thoughts inside the content are written in a new way
    "{% for m in messages %}{% set parts = m['content'].split('</think>') %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% if parts | length > 1 %}{{ '<think>\n' + parts[0].replace('<think>', '') + '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1] | trim + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
UNMARKED = (  # words only, no special token
    "{% for m in messages %}{{ ('### Answer:\n' if m['role'] == 'assistant' else '### Question:\n') + m['content'] + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Answer:\n' }}{% endif %}"
)
SHOUTED = "{% for m in messages %}{{ '<|start|>' + m['content'] | upper + '<|end|>' }}{% endfor %}"


def chat(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    turns = [Turn(role, text, role == "assistant") for role, text in zip(roles, texts, strict=False)]
    first = [Turn("system", system, False)] if system else []
    return Row((*first, *turns), None, None, "f:1")


def learnt(row, tokenizer, **settings):
    rendered = render(row, tokenizer, DataSpec(train="x", **settings))
    return [rendered.text[start:end] for start, end in rendered.spans], rendered.ends


TWO = chat("how was it", "good", "and the music", " good\n")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TRIMMED, ["good<|end|>", "good<|end|>"]),
        (INST, [" good<|eos|>", "  good\n<|eos|>"]),
        (CLOSED, ["good<|end|>", " good\n<|end|>"]),
        (THINKING, ["good<|end|>", "<think>\n\n</think>\n\n good\n<|end|>"]),
        (OPENED, ["good<|end|>", " good\n<|end|>"]),
    ],
)
def test_answers_with_their_end_of_turn_token(byte_tokenizer, template, expected):
    assert learnt(TWO, byte_tokenizer(template)) == (expected, False)


def test_text_that_stands_elsewhere_too_is_not_confused(byte_tokenizer):
    row = chat("user", "user", "assistant", "assistant")
    rendered = render(row, byte_tokenizer(), DataSpec(train="x"))
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["user<|end|>", "assistant<|end|>"]
    assert [rendered.text[:a].count("<|start|>") for a, _ in rendered.spans] == [2, 4]


def test_rewritten_thoughts_are_targets_as_the_template_shows_them(byte_tokenizer):
    row = chat("how was it", "<think>film, music</think>good")
    assert learnt(row, byte_tokenizer(MOVED)) == (["<think>\nfilm, music\n</think>\n\ngood<|end|>"], False)


def test_rewritten_text_that_looks_like_the_end_token(byte_tokenizer):
    row = chat("how was it", "<think>x</think>the end")
    assert learnt(row, byte_tokenizer(MOVED)) == (["<think>\nx\n</think>\n\nthe end<|end|>"], False)


def test_template_without_end_token_asks_for_end_of_text(byte_tokenizer):
    assert learnt(TWO, byte_tokenizer(UNMARKED)) == (["good", " good\n"], True)


def test_only_supervised_turns_count(byte_tokenizer):
    turns = [*TWO.turns]
    turns[1] = Turn("assistant", "good", False)
    assert learnt(Row(tuple(turns), None, None, "f:1"), byte_tokenizer()) == ([" good\n<|end|>"], False)


def test_template_that_hides_the_text_is_refused(byte_tokenizer):
    with pytest.raises(DataError, match=r"f:1: the chat template changes turn 2 so that its text 'good' cannot be found"):
        learnt(TWO, byte_tokenizer(SHOUTED))


def test_template_that_repeats_a_part_of_the_text_is_refused(byte_tokenizer):
    repeats = "{% for m in messages %}{{ '<|start|>' + m['content'] + m['content'][0] + '<|end|>' }}{% endfor %}"
    with pytest.raises(DataError, match="cannot be found in the result"):
        learnt(TWO, byte_tokenizer(repeats))


def test_template_that_knows_no_system_prompt_is_named(byte_tokenizer):
    with pytest.raises(
        DataError, match=r"refuses the turns \(system, user, assistant\): Only user and assistant.*chat_template off"
    ):
        learnt(chat("a", "b", system="s"), byte_tokenizer(INST))


def test_a_missing_chat_template_is_refused(byte_tokenizer):
    with pytest.raises(ConfigError, match=r"data.chat_template is 'on', but the tokenizer has no chat template; .* off"):
        uses_template(byte_tokenizer(None), DataSpec(train="x", chat_template="on"))
    assert not uses_template(byte_tokenizer(None), DataSpec(train="x"))
    assert not uses_template(byte_tokenizer(), DataSpec(train="x", chat_template="off"))


@pytest.mark.parametrize(
    ("texts", "text", "expected"),
    [
        (("2+2", "4"), "2+2\n4", ["4"]),
        (("2+2 =", " 4"), "2+2 = 4", [" 4"]),
        (("2+2\n", "4"), "2+2\n4", ["4"]),
        (("a", "b", "c", "d"), "a\nb\nc\nd", ["b", "d"]),
    ],
)
def test_raw_text_has_one_separator_and_ends(byte_tokenizer, texts, text, expected):
    rendered = render(chat(*texts), byte_tokenizer(), DataSpec(train="x", chat_template="off"))
    assert rendered.text == text and rendered.ends
    assert [rendered.text[a:b] for a, b in rendered.spans] == expected


def test_raw_separator_can_be_nothing(byte_tokenizer):
    assert render(chat("2+2=", "4"), byte_tokenizer(None), DataSpec(train="x", separator="")).text == "2+2=4"


def test_end_of_turn_tokens_leave_white_space_out(byte_tokenizer):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["\n\n", "<|start|>long"])
    assert end_of_turn_tokens(tokenizer)[0] == "<|start|>long" and "\n\n" not in end_of_turn_tokens(tokenizer)


class PanicException(BaseException):
    """As pyo3 names what a panic becomes: no Exception."""


class Broken:
    """A tokenizer of which every call raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def fail(self, *_: Any, **__: Any) -> Any:
        raise self.error

    encode = decode = apply_chat_template = __call__ = fail


CALLS: list[Callable[[Any], Any]] = [
    lambda tokenizer: encoded(tokenizer, "a"),
    lambda tokenizer: decoded(tokenizer, [1]),
    lambda tokenizer: templated(tokenizer, [{"role": "user", "content": "a"}]),
    lambda tokenizer: tokenised(tokenizer, ["a"]),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [PanicException("index"), RecursionError("deep"), OverflowError("-1"), KeyError("x")])
def test_what_it_raises_is_one_message(call: Callable[[Any], Any], error: BaseException) -> None:
    with pytest.raises(DataError, match=type(error).__name__):
        call(Broken(error))


def test_a_template_that_refuses_is_told_from_one_that_fails() -> None:
    for error in (TemplateError("no system prompt"), UndefinedError("x is undefined")):
        with pytest.raises(TemplateRefused, match=str(error)):
            templated(Broken(error), [])


def test_requests_to_stop_pass() -> None:
    with pytest.raises(KeyboardInterrupt):
        encoded(Broken(KeyboardInterrupt()), "a")
