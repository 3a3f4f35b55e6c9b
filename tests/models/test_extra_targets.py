"""Extras of a plan: whole modules and the rows of new tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lorakeet.core.plan import Plan
from lorakeet.errors import ConfigError
from tiny.models import tiny_model


def test_a_tied_head_shares_the_new_rows_and_an_own_head_gets_its_own(planned: Callable[..., Plan]) -> None:
    tied = planned(tiny_model("qwen2"), new_tokens=("<a>", "<b>")).extras
    assert [(e.path, e.tied, e.shape, e.tokens) for e in tied] == [("model.embed_tokens", "lm_head", (2, 32), ("<a>", "<b>"))]
    own = planned(tiny_model("llama"), new_tokens=("<a>", "<b>")).extras
    assert [(e.path, e.tied) for e in own] == [("model.embed_tokens", ""), ("lm_head", "")]


def test_only_extras_is_enough(planned: Callable[..., Plan]) -> None:
    plan = planned(tiny_model("llama"), target_modules=(), extra_modules=("model.norm",))
    assert not plan.entries
    assert plan.parameters == 32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"new_tokens": ("<a>", "<a>")}, "'<a>' is empty or named twice"),
        ({"new_tokens": ("",)}, "'' is empty or named twice"),
        ({"new_tokens": ("<a>",), "target_modules": ("embed_tokens",)}, "'model.embed_tokens' gets a pair as well"),
        ({"new_tokens": ("<a>",), "extra_modules": ("lm_head",)}, "leave it out of extra_modules"),
        ({"extra_modules": ("rotary_emb",)}, "without parameters"),
        ({"extra_modules": ("self_attn", "q_proj"), "target_modules": ("mlp",)}, "within it are both extras"),
    ],
)
def test_problems(planned: Callable[..., Plan], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tiny_model("llama"), **settings)
    assert words in str(caught.value)


def test_new_tokens_need_a_token_embedding(planned: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match="needs a token embedding, which Sequential does not have"):
        planned(nn.Sequential(nn.Linear(8, 8)), new_tokens=("<a>",))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"extra_modules": ("lm_head",)}, "leave it out of extra_modules"),
        ({"target_modules": ("lm_head",)}, "'lm_head' would be trained as an extra, and 'lm_head' gets a pair as well"),
    ],
)
def test_a_tied_head_that_gets_new_rows_takes_nothing_else(
    planned: Callable[..., Plan], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(tiny_model("qwen2"), new_tokens=("<a>",), **settings)
