"""Dense weights in the order in which oneDNN multiplies, for inference on a CPU.

A product of a few tokens with a plain weight spends half of its time on bringing the weight into that order. Done once, 16 tokens
in bf16 take 0.5 to 0.65 of the time, and one token half (docs/log.md). The plain weight is not kept beside it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from lorakeet.core.device import is_cpu
from lorakeet.core.lowrank import frozen_linear


class ReorderedBase:
    """A FrozenBase over such a weight (out, in). `dense` brings it back to the last bit, which takes memory for a copy."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` (out, in) on the CPU; see `can_reorder`."""
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self.store(weight)

    def matmul(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype or not len(x):
            return torch.mm(x, self.dense().to(x.dtype).t())
        y: Tensor = self._product(x, self._reordered, None, "none", [], "")
        return y

    def matmul_t(self, grad: Tensor) -> Tensor:
        return torch.mm(grad, self.dense().to(grad.dtype))

    def dense(self) -> Tensor:
        return self._reordered.to_dense()  # type: ignore[no-any-return]

    def store(self, weight: Tensor) -> None:
        self._reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self.dtype).contiguous())


class ReorderedLinear(nn.Module):
    """Stands in a model in place of an nn.Linear whose weight it takes over."""

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


def can_reorder(weight: Tensor) -> bool:
    """Whether oneDNN has an order of its own for such a weight on this machine."""
    return weight.dim() == 2 and weight.is_floating_point() and is_cpu(weight.device) and _works(weight.dtype)


@cache
def _works(dtype: torch.dtype) -> bool:
    """Tried on a small weight: which dtypes there are, depends on the processor."""
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    weight = torch.linspace(-1, 1, 48 * 32).view(48, 32).to(dtype)
    try:
        base = ReorderedBase(weight)
        found = base.matmul(weight[:3])
    except RuntimeError:
        return False
    return torch.equal(base.dense(), weight) and torch.allclose(found, torch.mm(weight[:3], weight.t()), rtol=0.02, atol=0.02)
