"""The one boundary around a tokenizer and its chat template, which may be a stranger's: whatever they raise is one message.

Tokenizers run code in Rust, whose panics are no Exception, and a template is a program. Neither time nor memory is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

from lorakeet.errors import DataError, one_message


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
