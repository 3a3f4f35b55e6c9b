"""A linear layer whose pair is trained through a quantiser that stands fixed: rounded forwards, straight through backwards.

    forwards     y = x·Q(V + s·(B·A − B₀·A₀))ᵀ + b       Q: to the nearest value of the grid
    backwards    ∂Q(W)/∂W = 1                            (Bengio et al. 2013, https://arxiv.org/abs/1308.3432)

V (out, in) is the folded weight as error feedback left it just before rounding (merge/requantise), so that training begins
where error feedback ended: with B = B₀ and A = A₀ the layer computes what was packed. V's numbers lie anywhere between the values
of the grid, so a small change of A and B moves some of them over.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Pair
from lorakeet.core.math import delta, scale_of
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.regrid import Grid


class StraightThroughLinear(nn.Module):
    """Stands where a packed layer stood while its pair is trained through the grid."""

    def __init__(self, latent: Tensor, pair: Pair, grid: Grid, bias: Tensor | None) -> None:
        super().__init__()
        self.scale = scale_of(pair.alpha, pair.rank, pair.scale_rule)
        self.A, self.B = (nn.Parameter(factor.detach().clone().float().to(latent.device)) for factor in (pair.A, pair.B))
        with torch.no_grad():
            self.start = latent - delta(self.A, self.B, self.scale)  # V − s·B₀·A₀
        self.grid = grid
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def weight(self) -> Tensor:
        """V + s·(B·A − B₀·A₀), (out, in), differentiable in A and B."""
        return self.start + delta(self.A, self.B, self.scale)

    @torch.no_grad()
    def packed(self) -> PackedBase:
        """What the layer computes with, packed."""
        return self.grid.nearest(self.weight())

    def forward(self, x: Tensor) -> Tensor:
        wide = self.weight()
        weight = wide + (self.grid.values(wide.detach()) - wide).detach()
        return torch.nn.functional.linear(x, weight.to(x.dtype), self.bias)
