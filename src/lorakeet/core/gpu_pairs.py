"""The low-rank products of pairs where each operation is a launch: one for each product, and none for casts, scales and stacks.

    h = s·x·Aᵀ      y += h·Bᵀ            u = s·g·B      ∂x += u·A      ∂B = gᵀ·h      ∂A = uᵀ·x

A and B are fp32; products take copies of them in their own dtype, the A's of layers with one input stacked, made in each pass.
∂A and ∂B come out of the product in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakeet.core.math import add_low_rank


def copy_of(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The factors stacked (all rows, columns), in `dtype`; one that is in it already is not copied."""
    detached = [factor.detach() for factor in factors]
    return (detached[0] if len(detached) == 1 else torch.cat(detached)).to(dtype)


class GpuPairs:
    """The products of pairs (core/pair_products.PairProducts) on a device. `parts` are rows with the numbers of their pairs,
    `scales` and `layers` those of each pair, `factors` A and B of each, alternating.
    """

    def __init__(
        self,
        parts: Sequence[tuple[slice, Sequence[int]]],
        scales: Sequence[float],
        layers: Sequence[int],
        factors: Sequence[Tensor],
        products: torch.dtype,
    ) -> None:
        self.parts, self.scales, self.layers = parts, scales, layers
        self.stacked = [copy_of([factors[2 * pair] for pair in pairs], products) for _, pairs in parts]
        self.bs = [copy_of([B], products) for B in factors[1::2]]
        self.dtypes = [(A.dtype, B.dtype) for A, B in zip(factors[::2], factors[1::2], strict=True)]
        self.ranks = [len(A) for A in factors[::2]]

    def _alike(self, pairs: Sequence[int]) -> bool:
        """Whether the pairs of a part have one scale, which h then has in it."""
        return all(self.scales[pair] == self.scales[pairs[0]] for pair in pairs)

    def add(self, ys: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        """Adds s·x·Aᵀ·Bᵀ to each layer's y (tokens, out), in place; returns h of each pair."""
        shrunk = []
        for (rows, pairs), A in zip(self.parts, self.stacked, strict=True):
            together = _scaled_mm(x[rows], A.t(), self.scales[pairs[0]] if self._alike(pairs) else 1.0)
            for pair, h in zip(pairs, torch.split(together, [self.ranks[pair] for pair in pairs], dim=1), strict=True):
                shrunk.append(h)
                add_low_rank(ys[self.layers[pair]][rows], h, self.bs[pair], 1.0 if self._alike(pairs) else self.scales[pair])
        return tuple(shrunk)

    def backward(
        self, grad_x: Tensor | None, grads: Sequence[Tensor], shrunk: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """u of each part, and ∂B of each pair; adds u·A to `grad_x` (tokens, in), in place, unless it is None."""
        through, of_bs = [], []
        for (rows, pairs), A in zip(self.parts, self.stacked, strict=True):
            us = A.new_empty(len(shrunk[pairs[0]]), len(A))
            for pair, u in zip(pairs, torch.split(us, [self.ranks[pair] for pair in pairs], dim=1), strict=True):
                grad = grads[self.layers[pair]][rows]
                u.addmm_(grad, self.bs[pair], beta=0, alpha=self.scales[pair])
                of_b = wide_mm(grad.t(), shrunk[pair], self.dtypes[pair][1])
                of_bs.append(of_b if self._alike(pairs) else of_b.mul_(self.scales[pair]))
            through.append(us)
            if grad_x is not None:
                grad_x[rows].addmm_(us, A)
        return tuple(through), of_bs

    def of_a(self, through: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """∂A of each pair, in its own dtype."""
        found: list[Tensor] = []
        for (rows, pairs), u in zip(self.parts, through, strict=True):
            whole = wide_mm(u.t(), x[rows], self.dtypes[pairs[0]][0])
            found += torch.split(whole, [self.ranks[pair] for pair in pairs])
        return [grad.to(dtype) for grad, (dtype, _) in zip(found, self.dtypes, strict=True)]


def _scaled_mm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale·left·right, in one operation."""
    if scale == 1.0:
        return torch.mm(left, right)
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scale)


def wide_mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left·right in `dtype`, not rounded to the narrow dtype of its arguments before, where the device's product allows it."""
    if left.dtype == dtype:
        return torch.mm(left, right)
    narrow = left.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
    if narrow and (left.device.type == "cuda" or hasattr(left, "fake_mode")):
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)
