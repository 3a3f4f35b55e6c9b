"""Adapted layers by themselves: the bare base bit for bit, one active adapter, embeddings with a scale, convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lorakeet.core.layers.linear import AdaptedLayer, LoraConv2d, LoraEmbedding, LoraLinear, dense_base_of, embed_scale, new_pair
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import PlanEntry


def filled(layer: AdaptedLayer, name: str, entry: PlanEntry, *, bias: bool = False) -> LoraPair:
    """A pair with random numbers, attached and active."""
    pair = LoraPair(entry, bias=bias)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.normal_(0, 0.3)
    layer.attach(name, pair)
    layer.active = name
    return pair


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_without_an_active_adapter_the_original_runs_bit_for_bit() -> None:
    linear, x = nn.Linear(6, 9), torch.randn(4, 6)
    layer = LoraLinear(linear, dense_base_of(linear, "linear"))
    filled(layer, "a", PlanEntry("q", "linear", (9, 6), 4, 12.0))
    adapted = layer(x)
    for active in (None, "unknown"):
        layer.active = active
        assert torch.equal(layer(x), linear(x))
        assert layer.pair() is None
    assert not torch.allclose(adapted, linear(x), atol=1e-2)
    assert (layer.weight is linear.weight, layer.bias is linear.bias) == (True, True)
    assert (layer.in_features, layer.out_features) == (6, 9)


def test_detaching_the_active_adapter_brings_the_base_back() -> None:
    linear, x = nn.Linear(6, 9), torch.randn(4, 6)
    layer = LoraLinear(linear, dense_base_of(linear, "linear"))
    first = filled(layer, "a", PlanEntry("q", "linear", (9, 6), 4, 12.0))
    filled(layer, "b", PlanEntry("q", "linear", (9, 6), 2, 12.0))
    layer.active = "a"
    kept = layer(x)
    layer.detach("b")
    assert torch.equal(layer(x), kept)
    assert layer.pair() is first
    layer.detach("a")
    assert layer.active is None
    assert torch.equal(layer(x), linear(x))


def test_the_bias_of_a_pair_is_scaled_with_it() -> None:
    linear, x = nn.Linear(6, 9), torch.randn(4, 6)
    layer = LoraLinear(linear, dense_base_of(linear, "linear"))
    pair = filled(layer, "a", PlanEntry("q", "linear", (9, 6), 4, 12.0), bias=True)
    expected = linear(x) + 3 * (x @ pair.A.t() @ pair.B.t() + pair.bias)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_embedding_is_the_lookup_of_its_folded_rows(scaled: bool, dtype: torch.dtype) -> None:
    original = Gemma3TextScaledWordEmbedding(20, 8, 0, embed_scale=7.3) if scaled else nn.Embedding(20, 8)
    original.to(dtype)
    layer, ids = LoraEmbedding(original), torch.tensor([[3, 3, 19], [0, 5, 1]])
    pair = filled(layer, "a", PlanEntry("e", "embedding", (20, 8), 4, 12.0))
    factor = float(torch.tensor(7.3).to(dtype)) if scaled else 1.0
    assert embed_scale(original) == factor
    rows = (original.weight.double() + 3 * pair.A.double().t() @ pair.B.double().t()).detach()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * float(rows.abs().max()) * factor
    assert torch.allclose(layer(ids).double(), rows[ids] * factor, atol=tolerance)
    assert layer(ids).dtype == dtype


@pytest.mark.parametrize("settings", [{"padding": 1}, {"stride": 2}, {"dilation": 2, "bias": False}, {"padding": "same"}])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_is_the_one_with_folded_weights(settings: dict[str, object], bias: bool) -> None:
    conv, x = nn.Conv2d(3, 8, 3, **settings), torch.randn(2, 3, 9, 9)  # type: ignore[arg-type]
    layer = LoraConv2d(conv)
    pair = filled(layer, "a", PlanEntry("c", "conv2d", (8, 3, 3, 3), 4, 12.0), bias=bias)
    weight = conv.weight + 3 * torch.einsum("or,rihw->oihw", pair.B[:, :, 0, 0], pair.A)
    extra = 3 * pair.bias.view(1, -1, 1, 1) if pair.bias is not None else 0
    expected = nn.functional.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation) + extra
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_a_convolution_drops_only_while_training() -> None:
    conv, x = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 9, 9)
    layer = LoraConv2d(conv)
    filled(layer, "a", PlanEntry("c", "conv2d", (8, 3, 3, 3), 4, 12.0, dropout=0.5))
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_the_weight_is_read_only_where_the_start_needs_it() -> None:
    def never() -> torch.Tensor:
        raise AssertionError

    new_pair(PlanEntry("q", "linear", (9, 6), 4, 12.0), weight=never, seed=0)
    with pytest.raises(AssertionError):
        new_pair(PlanEntry("q", "linear", (9, 6), 4, 12.0, start="olora"), weight=never, seed=0)
