"""Reading the module tree, adapted or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lorakeet.models import modules
from lorakeet.models.families import GENERIC, family_of
from tiny.models import tiny_model


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_an_adapted_model_reads_as_its_base(adapted: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    before = [(path, id(module)) for path, module in modules.original_modules(model)]
    assert before == [(path, id(module)) for path, module in model.named_modules(remove_duplicate=False)]
    adapted(model)
    assert [(path, id(module)) for path, module in modules.original_modules(model)] == before
    for path, layer in modules.adapted_layers(model):
        assert modules.find(model, path) is layer
        assert modules.path_of(model, layer.original) == path


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_blocks_are_found_without_a_family(name: str) -> None:
    model = tiny_model(name)
    assert modules.block_prefix(model, GENERIC) == modules.block_prefix(model, family_of(model.config)) != ("", 0)


def test_no_blocks() -> None:
    assert modules.block_prefix(nn.Linear(2, 2), GENERIC) == ("", 0)


def test_find_and_output_layer() -> None:
    model = tiny_model("llama")
    assert modules.find(model, "model.layers.1.mlp.up_proj") is model.model.layers[1].mlp.up_proj
    assert modules.find(model, "model.layers.7.mlp") is None
    assert modules.find(model, "") is model
    assert modules.output_layer(model) is model.lm_head
    assert modules.output_layer(nn.Linear(2, 2)) is None
    assert modules.is_router(tiny_model("qwen2_moe"), "model.layers.0.mlp.shared_expert_gate")
    assert not modules.is_router(tiny_model("qwen2_moe"), "model.layers.0.mlp.shared_expert.gate_proj")
