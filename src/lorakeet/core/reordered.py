"""Dense weights packed for inference on a CPU: in Lorakeet's own layout (kernels/cpu/panels), else oneDNN's.

A product of a few tokens with a plain weight spends half of its time on packing it. Packed once, 16 tokens in bf16 take 0.5 to
0.65
of the time with oneDNN, and one token half; in Lorakeet's own layout 0.7 and 0.55 of that (docs/log). The plain weight is not
kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from lorakeet.core.base import FrozenBase, matmul_each
from lorakeet.core.lowrank import frozen_linear
from lorakeet.kernels.choose import inference_layout
from lorakeet.kernels.cpu.panels import PanelGroup, Panels


class Order(Protocol):
    """A weight (out, in) in a packed layout."""

    def product(self, x: Tensor) -> Tensor:
        """x (tokens, in) to (tokens, out), both in the weight's dtype."""
        ...

    def dense(self) -> Tensor:
        """Restores the weight, to the last bit."""
        ...


class ReorderedBase:
    """A FrozenBase over such a weight (out, in). `dense` restores it to the last bit, in memory for a copy."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` (out, in) on the CPU; see `can_reorder`."""
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        self.store(weight)

    def matmul(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype or not len(x):
            return torch.mm(x, self.dense().to(x.dtype).t())
        return self.order.product(x)

    def matmul_t(self, grad: Tensor) -> Tensor:
        return torch.mm(grad, self.dense().to(grad.dtype))

    def dense(self) -> Tensor:
        return self.order.dense()

    def store(self, weight: Tensor) -> None:
        weight = weight.detach().to(self.dtype)
        self.order: Order = inference_layout(weight).offers(weight)


class ReorderedLinear(nn.Module):
    """Replaces an nn.Linear in a model and takes over its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = ReorderedBase(linear.weight)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """A copy of the weight, (out, in)."""
        return self.base.dense()

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) to (…, out)."""
        if torch.is_grad_enabled() and x.requires_grad:
            return frozen_linear(x, self.base, bias=self.bias)
        y = self.base.matmul(x.reshape(-1, self.in_features))
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class ReorderedProducts:
    """Weights with the same input x: one call for all of them, if all are in Lorakeet's own layout."""

    def __init__(self, bases: Sequence[FrozenBase]) -> None:
        self.bases = tuple(bases)
        self._orders: list[Order] = []
        self._beside: PanelGroup | None = None

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x (tokens, in) to x·Wᵀ (tokens, out) of each, which may be views of one tensor."""
        if len(x) and x.dtype == torch.bfloat16 and all(isinstance(base, ReorderedBase) for base in self.bases):
            orders = [cast(ReorderedBase, base).order for base in self.bases]
            if self._orders != orders:  # `store` may have replaced a base's weight
                self._orders = orders
                panels = [order for order in orders if isinstance(order, Panels)]
                self._beside = PanelGroup(panels) if len(panels) == len(orders) else None
            if self._beside is not None:
                return list(torch.split(self._beside.product(x), self._beside.outputs, dim=1))
        return matmul_each(self.bases, x)


def can_reorder(weight: Tensor) -> bool:
    """True if there is an inference layout for such a weight on this machine."""
    return inference_layout(weight).offers is not None
