"""One pass over a frozen base whose tokens use different pairs: some adapter, none, or a weighted mix of several.

        x ──┬── frozen base: x·Wᵀ ──────────────────────────────────── y
            ├── tokens of share 1:  w₁·s₁ · x·A₁ᵀ·B₁ᵀ ── added to its part of y
            └── tokens of share 2:  w₂·s₂ · x·A₂ᵀ·B₂ᵀ ── added to its part of y       (shares may overlap: a mix)

Two ways give the same numbers to rounding. Share by share costs what the pairs cost and is differentiable; stacked, all pairs are
one A (Σ rank, in) and one B (out, Σ rank), and what a token does not use is multiplied by zero: two products whatever the
number of adapters, which wins where each share has a token or two (decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lorakeet.core.base import FrozenBase
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import add_low_rank, grad_of_b, shrink_grad
from lorakeet.core.selection import Layout, Share


class SharedLowRank(torch.autograd.Function):
    """y = x·Wᵀ + b, plus w·s·x·Aᵀ·Bᵀ on each share's tokens. Backward as in LowRankLinear, share by share.

    With g = ∂L/∂y and, on the tokens of share i, uᵢ = wᵢ·sᵢ·g·Bᵢ:

        ∂L/∂Aᵢ = uᵢᵀ·x      ∂L/∂Bᵢ = wᵢ·sᵢ·gᵀ·(x·Aᵢᵀ)      ∂L/∂x = g·W + Σ uᵢ·Aᵢ on the tokens of each i
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: FrozenBase,
        bias: Tensor | None,
        products: torch.dtype,
        parts: tuple[tuple[slice, float], ...],
        *factors: Tensor,
    ) -> Tensor:
        wide = x.to(products)
        y = base.matmul(wide)
        if bias is not None:
            y.add_(bias)
        shrunk = []
        for (part, scale), A, B in zip(parts, factors[::2], factors[1::2], strict=True):
            shrunk.append(torch.mm(wide[part], A.to(products).t()))  # (tokens of the share, rank)
            add_low_rank(y[part], shrunk[-1], B.to(products), scale)
        ctx.save_for_backward(x, *shrunk, *factors)
        ctx.base, ctx.products, ctx.parts = base, products, parts
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.parts)
        x, saved = ctx.saved_tensors[0], ctx.saved_tensors[1:]
        shrunk, factors = saved[:count], saved[count:]
        grad, wide = grad.to(ctx.products).contiguous(), x.to(ctx.products)
        grad_x = ctx.base.matmul_t(grad) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for (part, scale), h, A, B in zip(ctx.parts, shrunk, factors[::2], factors[1::2], strict=True):
            need_a, need_b = ctx.needs_input_grad[5 + len(grads)], ctx.needs_input_grad[6 + len(grads)]
            u = shrink_grad(grad[part], B.to(ctx.products), scale)
            if grad_x is not None:
                grad_x[part].addmm_(u, A.to(ctx.products))
            grads.append(torch.mm(u.t(), wide[part]).to(A.dtype) if need_a else None)
            grads.append(grad_of_b(grad[part], h, scale).to(B.dtype) if need_b else None)
        return None if grad_x is None else grad_x.to(x.dtype), None, None, None, None, *grads


def shared_low_rank(
    x: Tensor,
    base: FrozenBase,
    shares: Sequence[tuple[Share, LoraPair]],
    *,
    bias: Tensor | None = None,
    products: torch.dtype | None = None,
) -> Tensor:
    """x (tokens, in) to (tokens, out), each share with its plain pair (no dropout, no bias, no DoRA), differentiable."""
    parts = tuple((slice(share.start, share.stop), share.weight * pair.scale) for share, pair in shares)
    factors = [factor for _, pair in shares for factor in pair.factors()]
    apply: Any = SharedLowRank.apply
    return cast(Tensor, apply(x, base, bias, products or x.dtype, parts, *factors))


class Stack:
    """The pairs of several adapters on one weight, one below the other, in the dtype of the products; for inference.

    Copies A and B once, when the set of adapters in use changes, not for every token.
    """

    def __init__(self, pairs: dict[str, LoraPair], products: torch.dtype) -> None:
        factors = [pair.factors() for pair in pairs.values()]
        self.A = torch.cat([A.detach().to(products) for A, _ in factors])  # (Σ rank, in)
        self.B = torch.cat([B.detach().to(products) for _, B in factors], dim=1)  # (out, Σ rank)
        self.products = products
        self.pairs = tuple(pairs.values())
        ranks = [A.shape[0] for A, _ in factors]
        self.layout: Layout = tuple((name, rank, pair.scale) for (name, pair), rank in zip(pairs.items(), ranks, strict=True))

    def apply(self, x: Tensor, base: FrozenBase, gates: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (tokens, in) in the products' dtype and `gates` (tokens, Σ rank) to (tokens, out), without gradient."""
        y = base.matmul(x)
        if bias is not None:
            y.add_(bias)
        return add_low_rank(y, torch.mm(x, self.A.t()).mul_(gates), self.B, 1.0)
