"""Renders conversations as strings and finds their supervised spans.

A supervised span starts where the template's generation prompt ends, and stops after the token that ends the turn. Nothing is
assumed about a template: spans are found by rendering it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jinja2 import TemplateError

from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.data.tool_calls import require_written
from lorakeet.errors import ConfigError, DataError, Remedy, one_message

# Replaces a turn's text to find its place; some templates trim surrounding white space.
_MARK = "\u2402lorakeet\u2403"
WITHOUT = Remedy("data.chat_template", "off", "Train without the chat template")
_LAST_WORD = re.compile(r"\w+\W*$")


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any
    bos_token_id: Any
    eos_token_id: Any
    added_tokens_decoder: Mapping[int, Any]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any: ...

    def apply_chat_template(
        self, conversation: Any, *, tools: Any = None, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


@dataclass(frozen=True)
class Rendered:
    """A row as one string; `spans` are its supervised spans (start, end); if `ends`, end-of-text must follow."""

    text: str
    spans: tuple[tuple[int, int], ...]
    ends: bool


# The boundary around a tokenizer and its template, which may be a stranger's: code in Rust panics, and a template is a program.
class TemplateRefused(DataError):
    """The chat template itself refuses the messages, or is none; the text is its reason."""


@contextmanager
def _bounded(tokenizer: Any, does: str) -> Iterator[None]:
    name = getattr(tokenizer, "name_or_path", "") or "the model"
    with one_message(f"The tokenizer of {name} {does}", "It may be damaged: fetch the model again, or use another text."):
        yield


def encoded(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The tokens of a text."""
    with _bounded(tokenizer, f"cannot read {text[:60]!r}"):
        return list(tokenizer.encode(text, **options))


def tokenised(tokenizer: Any, texts: str | list[str], **options: Any) -> Any:
    """What the tokenizer makes of texts: ids, mask and more."""
    with _bounded(tokenizer, "cannot read the texts"):
        return tokenizer(texts, **options)


def decoded(tokenizer: Any, ids: Any, **options: Any) -> str:
    """The text of tokens."""
    with _bounded(tokenizer, "cannot write its tokens as text"):
        return str(tokenizer.decode(ids, **options))


def templated(tokenizer: Any, messages: Sequence[Any], **options: Any) -> str:
    """The messages as the chat template writes them. TemplateRefused where it says that it takes no such messages."""
    with _bounded(tokenizer, "has a chat template that fails on these messages"):
        try:
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
        except TemplateError as error:
            raise TemplateRefused(str(error) or type(error).__name__) from error


def uses_template(tokenizer: Tokenizer, spec: DataSpec) -> bool:
    """True if conversations go through the tokenizer's chat template. Raises ConfigError if a required one is missing."""
    if spec.chat_template == "on" and not tokenizer.chat_template:
        raise ConfigError(
            "data.chat_template is 'on', but the tokenizer has no chat template; choose an instruction-tuned model, "
            f"set tokenizer.chat_template and save it with the model, or set "
            f"{WITHOUT.flag} to train on raw text.",
            remedies=[WITHOUT],
        )
    return spec.chat_template != "off" and bool(tokenizer.chat_template)


def prompt_format(row: Row, labels: Sequence[str], tokenizer: Tokenizer, spec: DataSpec) -> str:
    """How a row became a prompt, in words."""
    turns = "the tokenizer's chat template"
    if not is_templated(row, tokenizer, spec):
        turns = f"plain text, turns joined by {spec.separator!r}"
    text = f", each text in {spec.template!r}" if labels else ""
    return turns + text + (f", system prompt {spec.system!r}" if spec.system else "")


def is_templated(row: Row, tokenizer: Tokenizer, spec: DataSpec) -> bool:
    """True if this row goes through the chat template; raw text never does."""
    return uses_template(tokenizer, spec) and all(turn.role for turn in row.turns)


def render(row: Row, tokenizer: Tokenizer, spec: DataSpec) -> Rendered:
    """Renders the row and finds its supervised spans; uses the chat template unless it is off or the row is raw text."""
    if is_templated(row, tokenizer, spec):
        return _render_chat(row, tokenizer)
    if _has_tools(row):
        raise DataError(
            f"{row.source}: the row has tools or tool calls, which only a chat template can write. Use a model that has one for "
            "tools, set data.chat_template to auto, or remove them."
        )
    return _render_raw(row, spec)


def end_of_turn_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The added tokens of the tokenizer as text, longest first, without white space (Gemma adds such tokens)."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return tuple(sorted((name for name in names if name.strip()), key=lambda name: (-len(name), name)))


def _render_raw(row: Row, spec: DataSpec) -> Rendered:
    text = ""
    spans: list[tuple[int, int]] = []
    for turn in row.turns:
        joined = not text or text[-1].isspace() or turn.text[:1].isspace()
        # The separator before an answer belongs to the prompt, as at inference.
        text += "" if joined else spec.separator
        if turn.supervised:
            spans.append((len(text), len(text) + len(turn.text)))
        text += turn.text
    return Rendered(text, tuple(spans), ends=row.turns[-1].supervised)


def _render_chat(row: Row, tokenizer: Tokenizer) -> Rendered:
    text = _apply(row.turns, tokenizer, row)
    require_written(row, lambda renamed: _apply(renamed.turns, tokenizer, renamed))
    marks = end_of_turn_tokens(tokenizer)
    spans: list[tuple[int, int]] = []
    ends = False
    for number, turn in enumerate(row.turns):
        if not turn.supervised:
            continue
        start, end = _find_turn(row, number, text, tokenizer)
        if spans and start < spans[-1][1]:
            raise _unclear(row, number)
        closed = _after_mark(text, end, marks)
        ends = closed is None and number == len(row.turns) - 1
        spans.append((start, end if closed is None else closed))
    return Rendered(text[: spans[-1][1]] if ends else text, tuple(spans), ends)


def _find_turn(row: Row, number: int, text: str, tokenizer: Tokenizer) -> tuple[int, int]:
    """The span of turn `number` in the rendered text: from the end of the generation prompt to the end of its text."""
    opening = _apply(row.turns[:number], tokenizer, row, generation=True) if number else ""
    shown = _find_by_mark(row, number, text, tokenizer) or _find_by_prefix(row, number, text, opening, tokenizer)
    if shown is None:
        raise _unclear(row, number)
    # Whatever is between generation prompt and text (a space, an empty thinking block) is written by the model.
    if opening and text.startswith(opening) and len(opening) <= shown[0]:
        return len(opening), shown[1]
    return shown


def _find_by_mark(row: Row, number: int, text: str, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Finds the turn's text by replacing it with a mark; None if anything else changes."""
    turn = row.turns[number]
    if "tool_calls" in turn.extra:
        return None  # more than its text is written
    marked = _apply((*row.turns[:number], replace(turn, text=_MARK), *row.turns[number + 1 :]), tokenizer, row)
    start = marked.find(_MARK)
    if start < 0 or marked.count(_MARK) != 1:
        return None
    after = marked[start + len(_MARK) :]
    end = len(text) - len(after)
    if end < start or text[:start] != marked[:start] or text[end:] != after:
        return None
    return (start, end) if text[start:end].strip() == turn.text.strip() else None


def _find_by_prefix(row: Row, number: int, text: str, opening: str, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """For templates that rewrite the text (such as moving thoughts): the part that this turn adds to the prompt."""
    whole = _apply(row.turns[: number + 1], tokenizer, row)
    if not (opening and text.startswith(whole) and whole.startswith(opening)):
        return None
    calls = "tool_calls" in row.turns[number].extra
    last_word = _LAST_WORD.search(row.turns[number].text.rstrip())
    marks = end_of_turn_tokens(tokenizer)
    if calls:  # the end of a call may be an added token too: the end of the turn is the last of them
        marks = tuple(sorted(marks, key=lambda mark: -(whole.rfind(mark) + len(mark)) if mark in whole else 1))
    for mark in marks:
        before = whole[: whole.rfind(mark)].rstrip() if mark in whole else ""
        if len(before) > len(opening) and (calls or (last_word and before.endswith(last_word.group()))):
            return len(opening), len(before)
    return None


def _after_mark(text: str, end: int, marks: Sequence[str]) -> int | None:
    """The position after the end-of-turn token that follows `end`, with white space before it; None if none follows."""
    start = end
    while start < len(text) and text[start].isspace():
        start += 1
    for mark in marks:
        if text.startswith(mark, start):
            return start + len(mark)
    return None


def _apply(turns: Sequence[Turn], tokenizer: Tokenizer, row: Row, generation: bool = False) -> str:
    messages = [{"role": turn.role, "content": turn.text, **(json.loads(turn.extra) if turn.extra else {})} for turn in turns]
    tools = {"tools": json.loads(row.tools)} if row.tools else {}
    try:
        return templated(tokenizer, messages, add_generation_prompt=generation, **tools)
    except TemplateRefused as error:
        roles = ", ".join(turn.role for turn in turns)
        other = "remove the row" if _has_tools(row) else f"set {WITHOUT.flag}"
        raise DataError(
            f"{row.source}: the chat template refuses the turns ({roles}): {error}. Change the turns (some templates accept no "
            f"system prompt, some require user and assistant to alternate), or {other}.",
            remedies=[] if _has_tools(row) else [WITHOUT],
        ) from error


def _has_tools(row: Row) -> bool:
    """Whether only a chat template can write the row."""
    return bool(row.tools) or any(turn.extra for turn in row.turns)


def _unclear(row: Row, number: int) -> DataError:
    other = "remove the row" if _has_tools(row) else f"set {WITHOUT.flag}"
    return DataError(
        f"{row.source}: the chat template changes turn {number + 1} so that its text {row.turns[number].text[:60]!r} cannot be "
        f"found in the result, so its target tokens are unknown. Use another template, or {other}.",
        remedies=[] if _has_tools(row) else [WITHOUT],
    )
