"""Laws of every pair over every base in every dtype: the start changes nothing, merged equals unmerged, disk keeps the bytes.

Tolerances are relative to the largest output: fp64 1e-12, fp32 2e-6 (sums of a few dozen products), bf16 2⁻⁶ and fp16 2⁻⁹ (a few
units in the last place of weight, product and sum). Where the start's B·A cancels, eight times that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakeet.core.adapter import Adapter
from lorakeet.core.base import DenseBase, FrozenBase, SliceBase, TransposedBase
from lorakeet.core.dora import DoraPair
from lorakeet.core.layers.linear import AdaptedLayer, LoraConv2d, LoraEmbedding, LoraLinear, new_pair
from lorakeet.core.lowrank import LoraPair, low_rank_linear
from lorakeet.core.plan import PlanEntry
from lorakeet.formats.peft import peft
from tiny.adapters import random_pair

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
START_TOLERANCE = {**TOLERANCE, torch.float64: 2e-6}  # A and B are kept in fp32
KINDS = ("linear", "conv1d", "embedding", "conv2d", "experts")
VARIANTS = ("lora", "dora", "bias", "rslora")
PAIRS = [(k, v) for k in KINDS for v in VARIANTS if not (k in ("embedding", "experts") and v in ("dora", "bias"))]
CANCELLING = ("orthogonal", "pissa", "olora")  # A and B are not zero, so what remains of B·A is rounding
BEGINNINGS = [
    (kind, variant, start)
    for kind, variant in PAIRS
    for start in ("kaiming", "gaussian", *CANCELLING)
    if kind in ("linear", "conv1d") or start not in ("pissa", "olora")  # which the plan refuses elsewhere
]


class Experts(AdaptedLayer):
    """One expert of a stack, as the layer of experts computes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pair, base = self.pair(), SliceBase(self.original.weight, 1)
        if pair is None:
            return x @ base.dense().t()
        return low_rank_linear(x, base, (pair.A[1], pair.B[1], pair.scale))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 24, 16) * 0.2)


def layer_of(kind: str, dtype: torch.dtype) -> tuple[AdaptedLayer, torch.Tensor]:
    """A frozen layer of `kind` and an input for it."""
    torch.manual_seed(0)
    x = torch.randn(6, 16, dtype=dtype)
    if kind == "embedding":
        table = nn.Embedding(40, 16).to(dtype).requires_grad_(False)
        nn.init.normal_(table.weight, 0, 0.2)
        return LoraEmbedding(table), torch.tensor([[3, 39, 0, 3]])
    if kind == "conv2d":
        module = nn.Conv2d(6, 12, 3, padding=1, stride=2).to(dtype).requires_grad_(False)
        return LoraConv2d(module), torch.randn(2, 6, 5, 5, dtype=dtype)
    if kind == "experts":
        return Experts(Stack().to(dtype).requires_grad_(False)), x
    plain = nn.Linear(16, 24) if kind == "linear" else Conv1D(24, 16)
    module = plain.to(dtype).requires_grad_(False)
    nn.init.normal_(module.weight, 0, 0.2)
    base: FrozenBase = DenseBase(module) if kind == "linear" else TransposedBase(module)
    return LoraLinear(module, base), x


def entry_for(layer: AdaptedLayer, kind: str, variant: str, start: str = "kaiming") -> PlanEntry:
    shape = tuple(layer.weight.shape)
    rule = "alpha/sqrt(rank)" if variant == "rslora" else "alpha/rank"
    shape = shape[::-1] if kind == "conv1d" else shape
    return PlanEntry("q", kind, shape, 4, 12.0, rule, "dora" if variant == "dora" else "lora", start)  # type: ignore[arg-type]


def rows_first(layer: AdaptedLayer, kind: str) -> Callable[[], torch.Tensor]:
    weight = layer.weight.detach()
    return lambda: weight.t() if kind == "conv1d" else weight


def put(layer: AdaptedLayer, pair: nn.Module) -> None:
    layer.attach("a", pair)
    layer.active = "a"
    layer.eval()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kind", "variant", "start"), BEGINNINGS)
def test_the_start_changes_nothing(kind: str, variant: str, start: str, dtype: torch.dtype) -> None:
    layer, x = layer_of(kind, dtype)
    before = layer(x)
    put(layer, new_pair(entry_for(layer, kind, variant, start), weight=rows_first(layer, kind), seed=1))
    assert distance(layer(x), before) <= START_TOLERANCE[dtype] * (8 if start in CANCELLING else 1)
    layer.active = None
    assert torch.equal(layer(x), before)
    layer.detach("a")
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_merged_equals_unmerged(kind: str, variant: str, dtype: torch.dtype) -> None:
    layer, x = layer_of(kind, dtype)
    before = layer(x)
    value = random_pair(kind, layer.weight, dora=variant == "dora")
    entry = entry_for(layer, kind, variant)
    pair = (DoraPair if variant == "dora" else LoraPair)(entry, bias=variant == "bias")
    if isinstance(pair, DoraPair):
        pair.measure(rows_first(layer, kind)())
    pair.load(value)
    if pair.bias is not None:
        nn.init.normal_(pair.bias)
    put(layer, pair)
    with torch.no_grad():
        live = layer(x)
        layer.active = None
        layer.weight.copy_(pair.fold(layer.weight))
        if pair.bias is not None and layer.bias is not None:
            layer.bias.add_(pair.bias * pair.scale)
    assert distance(before, live) > 0.05
    assert distance(layer(x), live) <= max(TOLERANCE[dtype], 2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_load_save_keeps_the_bytes(variant: str, tmp_path: Path) -> None:
    pairs = {}
    for kind, has in PAIRS:
        if has != variant:
            continue
        weight = layer_of(kind, torch.float32)[0].weight
        more: dict[str, Any] = {"scale_rule": "alpha/sqrt(rank)"} if variant == "rslora" else {}
        more |= {"bias": torch.randn(12 if kind == "conv2d" else 24)} if variant == "bias" else {}
        path = f"block.{kind}.down_proj" if kind == "experts" else f"block.{kind}"
        pairs[path] = random_pair(kind, weight, dora=variant == "dora", **more)
    peft.write(Adapter(pairs, base="some/base"), tmp_path / "one")
    back = peft.read(tmp_path / "one")
    peft.write(back, tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for path, pair in pairs.items():
        for part in ("A", "B", "magnitude", "bias"):
            mine, theirs = getattr(pair, part), getattr(back.pairs[path], part)
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)
        assert (back.pairs[path].kind, back.pairs[path].scale) == (pair.kind, pair.scale)
