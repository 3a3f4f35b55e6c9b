"""Grouped products of experts: what products expert by expert compute, in a few launches and without a wait."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.core.layers import grouped_experts
from lorakeet.core.layers.experts import LoraExperts
from lorakeet.core.layers.grouped_experts import Sorted, grouped_product_proved, why_not_grouped
from lorakeet.core.spec import LoraSpec
from lorakeet.models.families import family_of
from lorakeet.models.inject import inject, trained_parameters
from lorakeet.models.targets import plan_for
from tiny.models import tiny_model
from tiny.simulated_card import simulated_card

CARD = torch.device("cuda", 0)


def layer_of(family: str) -> tuple[LoraExperts, Any]:
    """The first block of experts of a tiny model in bf16 with pairs whose numbers are all random, and the model."""
    model = tiny_model(family).bfloat16()
    inject(model, plan_for(model, LoraSpec(rank=8, alpha=24.0), family_of(model.config)), "default", seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(trained_parameters(model, "default").values()):
            draw = torch.Generator().manual_seed(number)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return next(module for module in model.modules() if isinstance(module, LoraExperts)), model


def passes(layer: LoraExperts, device: str) -> list[Tensor]:
    """The result, ∂x and the gradients of the pairs of a made-up batch with a dropped choice."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(12, 32, generator=draw).bfloat16().to(device).requires_grad_()
    index = torch.randint(0, layer.count, (12, 2), generator=draw)
    index[3, 1] = layer.count  # transformers' mark of a dropped choice
    weights = torch.rand(12, 2, generator=draw).to(device)
    layer.train()
    y = layer(x, index.to(device), weights)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [each.detach().float().cpu() for each in (y, *torch.autograd.grad(y.float().square().sum(), [x, *parameters]))]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_numbers_are_those_expert_by_expert(family: str) -> None:
    layer, model = layer_of(family)
    expected = passes(layer, "cpu")
    counts = dict(layer.tokens)
    layer.tokens.clear()
    with simulated_card((9, 0)) as card:
        model.to("cuda")
        found = passes(layer, "cuda")
        assert card.launches["_grouped_mm"] > 0
        of_grouped = layer.tokens
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= 5e-2 * theirs.norm(), "of fp32 numbers the loop's are up to 0.037 away, these 0.013"
    assert sum(of_grouped.values()) - sum(counts.values()) == 1, "but for the dropped choice, which counts as the last expert's"


def test_choices_are_sorted_by_expert() -> None:
    index, weights = torch.tensor([[2, 0], [1, 3], [0, 2]]), torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    found = Sorted.of(index, weights, 3)
    assert found.tokens.tolist() == [0, 2, 1, 0, 1, 2] and found.experts.tolist() == [0, 0, 1, 2, 2, 2]
    assert found.ends.tolist() == [2, 3, 6] and found.ends.dtype == torch.int32
    assert found.weights.flatten().tolist() == pytest.approx([0.2, 0.5, 0.3, 0.1, 0.0, 0.6])


def test_where_they_are_not_used() -> None:
    x = torch.zeros(4, 32, dtype=torch.bfloat16)
    assert "CUDA device" in why_not_grouped(x, None, (32, 16))
    for capability in ((8, 0), (12, 0)):
        with simulated_card(capability) as card:
            assert "9 or 10" in why_not_grouped(x.to("cuda"), None, (32, 16)) and card.waits
    with simulated_card((9, 0)):
        assert "multiples of 8; these are 32, 12" in why_not_grouped(x.to("cuda"), None, (32, 12))
        assert why_not_grouped(x.to("cuda"), torch.bfloat16, (32, 16)) == ""


def test_a_product_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    own = grouped_experts.grouped_product
    with simulated_card((9, 0)), caplog.at_level(logging.WARNING):
        monkeypatch.setattr(grouped_experts, "grouped_product", lambda *given: own(*given) * 1.5)
        assert not grouped_product_proved(CARD)
    assert "computes y otherwise than each expert does" in caplog.text
