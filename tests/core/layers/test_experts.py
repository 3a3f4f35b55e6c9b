"""Experts with pairs against transformers' own block with folded parameters."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4

from lorakeet.core.layers.experts import ExpertPairs, LoraExperts, why_not_experts
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import PlanEntry
from lorakeet.core.selection import Share
from tiny.models import tiny_model


@pytest.fixture
def block() -> Any:
    return tiny_model("mixtral").model.layers[0].mlp.experts


def routed(tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 32, generator=generator)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(tokens)])
    return x, index, torch.rand(tokens, 2, generator=generator)


def with_pairs(block: nn.Module, *names: str, dropout: float = 0.0) -> LoraExperts:
    layer, pairs = LoraExperts(block), ExpertPairs()
    torch.manual_seed(2)
    for name in names:
        shape = tuple(block.get_parameter(name).shape)
        pairs[name] = LoraPair(PlanEntry(name, "experts", shape, 4, 12.0, dropout=dropout))
        with torch.no_grad():
            pairs[name].A.normal_(0, 0.2)
            pairs[name].B.normal_(0, 0.2)
    layer.attach("a", pairs)
    layer.active = "a"
    return layer.eval()


@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",), ()])
def test_pairs_are_folded_parameters(block: Any, names: tuple[str, ...]) -> None:
    layer, folded = with_pairs(block, *names), copy.deepcopy(block)
    for name in names:
        pair = cast(LoraPair, layer.adapters["a"][name])
        getattr(folded, name).data += 3 * torch.einsum("eor,eri->eoi", pair.B, pair.A).detach()
    arguments = routed()
    assert torch.allclose(layer(*arguments), folded(*arguments), atol=1e-5)
    layer.active = None
    assert torch.equal(layer(*arguments), block(*arguments))


def test_experts_that_clamp_their_gate_do_so_with_pairs() -> None:
    """DeepSeek-V4's clamp at 10, beyond the activations of its random weights."""
    config = transformers.DeepseekV4Config(
        hidden_size=32, moe_intermediate_size=24, num_local_experts=4, swiglu_limit=10.0, experts_implementation="eager"
    )
    block = modeling_deepseek_v4.DeepseekV4Experts(config).requires_grad_(False)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0, 0.2, generator=torch.Generator().manual_seed(0))
    x, index, weights = routed()
    layer = with_pairs(block)
    for size in (1, 50):
        torch.testing.assert_close(layer(size * x, index, weights), block(size * x, index, weights))


def test_an_expert_without_tokens_gets_no_gradient(block: Any) -> None:
    layer = with_pairs(block, "gate_up_proj", "down_proj")
    x, index, weights = routed()
    layer(x, index % 3, weights).square().sum().backward()
    for parameter in layer.adapters.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad[3], torch.zeros_like(parameter.grad[3]))
        assert all(parameter.grad[expert].abs().max() > 0 for expert in range(3))


def test_a_dropped_choice_adds_nothing(block: Any) -> None:
    """transformers marks a choice as dropped by an index past the last expert."""
    layer = with_pairs(block, "down_proj")
    x, index, weights = routed()
    dropped = index.clone()
    dropped[0, 1] = 4
    none = weights.clone()
    none[0, 1] = 0
    assert torch.allclose(layer(x, dropped, weights), layer(x, index, none), atol=1e-6)


def test_dropout_only_while_training(block: Any) -> None:
    layer, arguments = with_pairs(block, "gate_up_proj", dropout=0.5), routed()
    assert torch.equal(layer(*arguments), layer(*arguments))
    layer.train()
    assert not torch.equal(layer(*arguments), layer(*arguments))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("is_transposed", True, "transposed"),
        ("has_bias", True, "biases"),
        ("has_gate", False, "no gate"),
        ("is_concatenated", False, "interleaved"),
        ("has_post_expert_norm", True, "norm"),
        ("gate_up_proj_bias", torch.zeros(1), "biases"),
    ],
)
def test_what_cannot_be_adapted_is_said(block: Any, name: str, value: Any, words: str) -> None:
    assert why_not_experts(block) == ""
    setattr(block, name, value)
    assert words in why_not_experts(block)


def test_other_modules_are_no_experts(block: Any) -> None:
    assert "no gate_up_proj and down_proj" in why_not_experts(nn.Linear(2, 2))
    del block.act_fn
    assert "no act_fn" in why_not_experts(block)


def test_a_divided_batch_is_refused_and_not_answered_by_the_base(block: Any) -> None:
    layer = with_pairs(block, "down_proj")
    layer.selection.divide([Share(0, 3, "a")], units=7)
    with pytest.raises(ValueError, match="pairs on experts cannot differ within a batch"):
        layer(*routed())


def test_experts_that_hand_tokens_on_as_they_are_are_refused(block: Any) -> None:
    block.down_proj = nn.Parameter(block.down_proj[:-1].detach())
    assert "some of its experts have no down_proj" in why_not_experts(block)


def test_tokens_of_training_are_counted_by_expert(block: Any) -> None:
    layer = with_pairs(block, "gate_up_proj")
    arguments = routed()
    chosen = torch.bincount(arguments[1].flatten(), minlength=4).tolist()
    layer(*arguments)
    with torch.no_grad():
        layer.train()(*arguments)
    assert not layer.tokens and layer.count == 4  # neither in evaluation nor without gradients
    layer(*arguments)
    layer(*arguments)
    assert [layer.tokens[expert] for expert in range(4)] == [2 * count for count in chosen] and sum(chosen) == 14
