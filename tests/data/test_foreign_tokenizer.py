"""Whatever a stranger's tokenizer or chat template raises is one message, also of code in Rust and of a full stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from jinja2 import TemplateError, UndefinedError

from lorakeet.data.foreign_tokenizer import TemplateRefused, decoded, encoded, templated, tokenised
from lorakeet.errors import DataError


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
