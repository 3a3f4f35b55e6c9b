"""The modules that stand in the model in place of the frozen ones. Each holds the original, untouched, and its adapters by name.

`active` is the name of the adapter in use, or None for the bare base: then the original module runs, bit for bit.
`models/inject` puts these in and takes them out; nothing else replaces modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.base import DenseBase, FrozenBase, TransposedBase
from lorakeet.core.dora import DoraPair
from lorakeet.core.lowrank import LoraPair, frozen_linear
from lorakeet.core.plan import PlanEntry
from lorakeet.core.start import begin


class StandIn(nn.Module):
    """A module that stands in a model in place of `original`, which it holds untouched."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original


class AdaptedLayer(StandIn):
    """A frozen module with any number of named adapters, one of which may be active."""

    products: torch.dtype | None = None  # dtype of the matrix products (core/precision); None: that of the input

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    def attach(self, name: str, adapter: nn.Module) -> None:
        """Adds `adapter` under `name`; `activate` makes it count."""
        self.adapters[name] = adapter

    def detach(self, name: str) -> None:
        """Forgets the adapter `name`; if it was active, the bare base is in use again."""
        del self.adapters[name]
        self.active = None if self.active == name else self.active

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for model code that asks a linear layer for its weight's dtype or device."""
        return cast(Tensor, self.original.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.original, "bias", None))

    def pair(self) -> LoraPair | None:
        """The active pair, or None where the active adapter leaves this layer alone."""
        return cast(LoraPair, self.adapters[self.active]) if self.active is not None and self.active in self.adapters else None


class LoraLinear(AdaptedLayer):
    """nn.Linear, GPT-2's Conv1D or a quantised linear layer, seen through a FrozenBase."""

    def __init__(self, original: nn.Module, base: FrozenBase) -> None:
        super().__init__(original)
        self.base = base

    @property
    def in_features(self) -> int:
        return self.base.shape[1]

    @property
    def out_features(self) -> int:
        return self.base.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        pair = self.pair()
        if pair is not None:
            return cast(Tensor, pair(x, self.base, self.bias, self.products))
        if self.products is None or self.products == x.dtype:
            return cast(Tensor, self.original(x))
        return frozen_linear(x, self.base, bias=self.bias, products=self.products)


class LoraEmbedding(AdaptedLayer):
    """nn.Embedding, also Gemma's scaled one: ids to W[ids] + scale·A[:, ids]ᵀ·Bᵀ."""

    original: nn.Embedding

    def forward(self, ids: Tensor) -> Tensor:
        y = cast(Tensor, self.original(ids))
        pair = self.pair()
        if pair is None:
            return y
        shrunk = nn.functional.embedding(ids, pair.A.t())  # (…, rank)
        factor = pair.scale * embed_scale(self.original)
        return y + (factor * (shrunk @ pair.B.t())).to(y.dtype)


def embed_scale(module: nn.Module) -> float:
    """Gemma multiplies the looked-up row by √hidden, rounded to the weight's dtype; a low-rank part must be multiplied alike."""
    scale = torch.as_tensor(getattr(module, "embed_scale", 1.0))
    return float(scale.to(cast(Tensor, module.weight).dtype))


class LoraConv2d(AdaptedLayer):
    """nn.Conv2d with one group: a k×k convolution to `rank` channels, then a 1×1 one."""

    original: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        pair = self.pair()
        if pair is None:
            return cast(Tensor, self.original(x))
        conv, dtype = self.original, x.dtype
        dropped = nn.functional.dropout(x, pair.dropout, pair.training)
        shrunk = nn.functional.conv2d(
            dropped, pair.A.to(dtype), stride=conv.stride, padding=conv.padding, dilation=conv.dilation
        )
        bias = None if pair.bias is None else pair.bias.to(dtype)
        low_rank = nn.functional.conv2d(shrunk, pair.B.to(dtype), bias) * pair.scale
        if not isinstance(pair, DoraPair):
            return cast(Tensor, conv(x)) + low_rank
        plain = nn.functional.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation)
        y = (plain + low_rank) * pair.gain(_FlatConv(conv), dtype).to(dtype).view(1, -1, 1, 1)
        return y if conv.bias is None else y + conv.bias.view(1, -1, 1, 1)


class _FlatConv(DenseBase):
    """A convolution's weight as (out, in·k·k), for DoRA's row norms."""

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.module.weight).flatten(1)


def new_pair(entry: PlanEntry, *, weight: Callable[[], Tensor], seed: int, device: torch.device | str = "cpu") -> LoraPair:
    """A pair as `entry` plans it, begun; `weight()` gives the frozen W with output rows first, and is called only if needed."""
    pair: LoraPair = DoraPair(entry, device=device) if entry.variant == "dora" else LoraPair(entry, device=device)
    needs_weight = entry.start in ("pissa", "olora")
    begin(pair, entry.start, weight=weight() if needs_weight else torch.empty(0), path=entry.path, seed=seed)
    if isinstance(pair, DoraPair):
        pair.measure(weight())
    return pair


def base_of(module: Any, kind: str) -> FrozenBase:
    """The FrozenBase over a dense linear module; quantised ones come from `quant/adopt`."""
    return TransposedBase(module) if kind == "conv1d" else DenseBase(module)
