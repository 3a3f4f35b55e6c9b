"""Adapters, mixes and numbers of pictures, as `lorakeet generate` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import ConfigError
from lorakeet.kinds.images.drawing_options import GenerateOptions, adapters_and_mixes, parse_mix


def options(**given: Any) -> GenerateOptions:
    return GenerateOptions(**{"prompt": ("x", "y"), "out": Path("out"), **given})


def test_mixes_are_read() -> None:
    assert parse_mix("base") == {} and parse_mix("a") == {"a": 1.0} and parse_mix("a=0.7 + b=-0.3") == {"a": 0.7, "b": -0.3}
    for text in ("a=x", "=1", "a+a", "a=nan"):
        with pytest.raises(ConfigError, match="cannot be read"):
            parse_mix(text)


def test_each_prompt_has_its_mix() -> None:
    paths, mixes = adapters_and_mixes(options(adapter=("a=one", "b=two"), each=("a", "a=0.5+b=2")))
    assert paths == {"a": Path("one"), "b": Path("two")} and mixes == [{"a": 1.0}, {"a": 0.5, "b": 2.0}]
    assert adapters_and_mixes(options(adapter=("runs/x",)))[1] == [{"adapter": 1.0}] * 2
    assert adapters_and_mixes(options()) == ({}, [{}, {}])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"count": 0}, "--count is 0"),
        ({"adapter": ("base=x",)}, "means no adapter"),
        ({"each": ("a",)}, "No adapter is called 'a'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        adapters_and_mixes(options(**given))
