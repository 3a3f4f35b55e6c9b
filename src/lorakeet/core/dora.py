"""DoRA (https://arxiv.org/abs/2402.09353): W' = m ∘ (W + s·B·A) / ‖W + s·B·A‖, a trained magnitude m for each output row.

As in section 4.3 of the paper the norm is a constant for the gradient. It is computed without forming B·A:

    ‖W + s·B·A‖² = ‖W‖² + 2s·Σ((W·Aᵀ) ∘ B) + s²·Σ((B·(A·Aᵀ)) ∘ B)        (sums over each row)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakeet.core.adapter import Pair
from lorakeet.core.base import FrozenBase
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import fold
from lorakeet.core.plan import PlanEntry

_AT_ONCE = 1 << 20  # elements of W
_TINY = 1e-12  # keeps an all-zero row from dividing by zero


class DoraPair(LoraPair):
    """A pair with a trained magnitude per output row; for linear, GPT-2 Conv1D and 2-D convolution weights."""

    base_norm2: Tensor

    def __init__(self, entry: PlanEntry, *, device: torch.device | str = "cpu", bias: bool = False) -> None:
        super().__init__(entry, device=device, bias=bias)
        rows = entry.shape[0]
        self.magnitude = torch.nn.Parameter(torch.ones(rows, device=device))
        self.register_buffer("base_norm2", torch.ones(rows, device=device))

    def measure(self, rows: Tensor) -> None:
        """Sets ‖W‖² from W as (out, in), and m to ‖W + s·B·A‖, so that the start changes nothing."""
        with torch.no_grad():
            flat = rows.flatten(1).float()
            at_once = max(1, _AT_ONCE // flat.shape[1])
            for first in range(0, len(flat), at_once):  # limits the memory for squares beside W
                part = slice(first, first + at_once)
                self.base_norm2[part].copy_(flat[part].pow(2).sum(1))
            self.magnitude.copy_(self._norm(flat @ self.factors()[0].flatten(1).t().to(flat.device)))

    def _norm(self, projected: Tensor) -> Tensor:
        """‖W + s·B·A‖ by row, given W·Aᵀ (out, rank)."""
        A, B = (factor.detach().float().flatten(1) for factor in self.factors())
        cross = (projected.float() * B).sum(1)
        square = ((B @ (A @ A.t())) * B).sum(1)
        norm2 = self.base_norm2 + 2 * self.scale * cross + self.scale**2 * square
        return norm2.clamp_min(_TINY).sqrt()

    def gain(self, base: FrozenBase, dtype: torch.dtype) -> Tensor:
        """m / ‖W + s·B·A‖ by row (out,), fp32; the product W·Aᵀ runs in `dtype`."""
        with torch.no_grad():
            A = self.factors()[0].detach().flatten(1).to(dtype)
            norm = self._norm(base.matmul(A).t())
        return self.magnitude / norm

    def forward(self, x: Tensor, base: FrozenBase, bias: Tensor | None = None, products: torch.dtype | None = None) -> Tensor:
        y = super().forward(x, base, None, products)
        y = (y * self.gain(base, products or x.dtype)).to(y.dtype)  # a gain in bf16 would be wrong by up to 0.4 %
        return y if bias is None else y + bias

    def fold(self, weight: Tensor) -> Tensor:
        """m ∘ (W + ΔW) / ‖W + ΔW‖ in the dtype of `weight`."""
        full = fold(weight.detach().float(), self.delta().detach().to(weight.device), in_change=True)
        rows = full.t() if self.kind == "conv1d" else full
        norm = rows.flatten(1).norm(dim=1).clamp_min(_TINY**0.5)
        gain = (self.magnitude.detach().to(weight.device) / norm).view(-1, *([1] * (rows.dim() - 1)))
        rows.mul_(gain)
        return full.to(weight.dtype)

    def load(self, pair: Pair) -> None:
        super().load(pair)
        if pair.magnitude is not None:
            with torch.no_grad():
                self.magnitude.copy_(pair.magnitude)

    def _magnitude_value(self) -> Tensor:
        return self.magnitude.detach().float().cpu().clone()
