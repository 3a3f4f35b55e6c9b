"""An adapter for another base: every mismatch is listed in one message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorakeet.core.adapter import Adapter, Pair, TokenRows
from lorakeet.errors import ConfigError
from lorakeet.models.fits import plan_of
from lorakeet.models.inject import adapter_of
from tiny.adapters import random_adapter
from tiny.models import tiny_model


def message(model: Any, adapter: Adapter) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_of(model, adapter)
    return str(caught.value)


def test_the_plan_is_the_adapter() -> None:
    model = tiny_model("mixtral")
    adapter = random_adapter(model, "q_proj", "gate_up_proj", "embed_tokens")
    plan = plan_of(model, adapter)
    assert {entry.path for entry in plan.entries} == set(adapter.pairs)
    assert plan.parameters == adapter.parameters


def test_every_mismatch_is_listed() -> None:
    adapter = random_adapter(tiny_model("llama", hidden_size=64, num_hidden_layers=3), "q_proj", "down_proj")
    text = message(tiny_model("llama"), replace(adapter, base="big-llama"))
    assert text.startswith("The adapter does not fit this base (")
    assert "'model.layers.0.self_attn.q_proj': A is 4×64, but this base needs 4×32." in text
    assert "'model.layers.0.mlp.down_proj': B is 64×4, but this base needs 32×4." in text
    assert "'model.layers.2.self_attn.q_proj': this base has no such module. Did you mean" in text
    assert text.endswith("Use the base that it was trained on: big-llama.")
    assert len(text.splitlines()) == 2 + 2 * 2 + 2 + 2


def test_kinds_extras_and_rows() -> None:
    linear = Pair(torch.zeros(4, 32), torch.zeros(32, 4), 12.0)
    adapter = Adapter(
        pairs={
            "model.embed_tokens": linear,
            "model.layers.0.mlp.experts.gate_up_proj": replace(linear, kind="experts"),
            "model.layers.0.self_attn.q_proj": replace(linear, magnitude=torch.ones(7), bias=torch.ones(8)),
        },
        extras={"model.norm.wieght": torch.zeros(32), "model.layers.0.input_layernorm.weight": torch.zeros(5)},
        token_rows={
            "model.norm": TokenRows((96,), torch.zeros(1, 32)),
            "lm_head": TokenRows((96,), torch.zeros(1, 31)),
        },
    )
    text = message(tiny_model("llama"), adapter)
    for words in (
        "'model.embed_tokens': the pair is for a linear weight, but this base has a Embedding there.",
        "'model.layers.0.mlp.experts.gate_up_proj': this base has no such expert parameter.",
        "magnitude is 7, but this base needs 32.",
        "bias is 8, but this base needs 32.",
        "'model.norm.wieght': this base has no such parameter.",
        "'model.layers.0.input_layernorm.weight': it is 5, but this base needs 32.",
        "'model.norm': this base has no embedding or head there",
        "'lm_head': token rows are 1×31, but this base needs 1×32.",
    ):
        assert words in text
    assert "(8 problems)" in text


def test_rows_that_are_tied_elsewhere() -> None:
    rows = {"model.embed_tokens": TokenRows((96,), torch.zeros(1, 32), tied="lm_head")}
    assert "shared with 'lm_head', which this base does not tie to it" in message(
        tiny_model("llama"), Adapter({}, token_rows=rows)
    )
    plan_of(tiny_model("qwen2"), Adapter({}, token_rows=rows))


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ((100_000_000,), "'model.embed_tokens': it has a trained row for the token id 100,000,000, and this base has 96 rows"),
        ((-1,), "token id -1, and this base has 96 rows"),
        ((3, 3), "it has two trained rows for one token id"),
    ],
)
def test_ids_that_no_row_of_this_base_can_have(ids: tuple[int, ...], words: str) -> None:
    rows = {"model.embed_tokens": TokenRows(ids, torch.zeros(len(ids), 32))}
    assert words in message(tiny_model("llama"), Adapter({}, token_rows=rows))


def test_rows_of_both_ends_of_a_tied_base() -> None:
    rows = {path: TokenRows((3,), torch.zeros(1, 32)) for path in ("model.embed_tokens", "lm_head")}
    plan_of(tiny_model("llama"), Adapter({}, token_rows=rows))
    assert "'lm_head' and 'model.embed_tokens' have trained token rows each, but this base has one weight for both" in message(
        tiny_model("llama", tie_word_embeddings=True), Adapter({}, token_rows=rows)
    )


def test_a_head_that_shares_token_rows_is_not_changed_in_another_way() -> None:
    """PEFT computes with the rows alone there, and leaves the pair out."""
    rows = {"model.embed_tokens": TokenRows((3,), torch.zeros(1, 32))}
    pair = replace(random_adapter(tiny_model("llama"), "lm_head"), token_rows=rows)
    whole = Adapter({}, extras={"lm_head.weight": torch.zeros(96, 32)}, token_rows=rows)
    for both in (pair, whole):
        plan_of(tiny_model("llama"), both)
        words = "'lm_head': the adapter changes it, and this base ties it to 'model.embed_tokens', whose trained token rows"
        assert words in message(tiny_model("llama", tie_word_embeddings=True), both)


def test_half_of_a_whole_module_is_refused(adapted: Callable[..., Any]) -> None:
    value = adapter_of(adapted(tiny_model("gpt2"), extra_modules=("ln_f",)))
    assert set(value.extras) == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    half = replace(value, extras={"transformer.ln_f.weight": value.extras["transformer.ln_f.weight"]})
    assert "'transformer.ln_f.bias': the adapter trains 'transformer.ln_f' whole, but lacks" in message(tiny_model("gpt2"), half)


def test_pair_and_whole_weight_for_one_module() -> None:
    adapter = random_adapter(tiny_model("llama"), "lm_head")
    both = replace(adapter, extras={"lm_head.weight": torch.zeros(96, 32)})
    words = "'lm_head.weight': the adapter has a pair for it and another weight than this base has"
    assert words in message(tiny_model("llama"), both)
