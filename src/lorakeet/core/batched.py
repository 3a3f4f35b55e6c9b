"""One pass over a frozen base whose tokens use different pairs: some adapter, none, or a weighted mix of several.

        x ──┬── frozen base: x·Wᵀ ──────────────────────────────────── y
            ├── tokens of share 1:  w₁·s₁ · x·A₁ᵀ·B₁ᵀ ── added to its part of y
            └── tokens of share 2:  w₂·s₂ · x·A₂ᵀ·B₂ᵀ ── added to its part of y       (shares may overlap: a mix)

Two ways give the same numbers to rounding. Share by share costs what the pairs cost and is differentiable; stacked, all pairs are
one A (P, rank, in) and one B (P, rank, out), each pair sees its own tokens, and the number of products does not depend on the
number of adapters, which wins where each share has a token or two (decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lorakeet.core.base import FrozenBase
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import add_low_rank, add_stacked, grad_of_b, shrink_grad
from lorakeet.core.selection import Layout, Share, Table


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


def stacked_in(products: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a stack: fp32 on a CPU, where products of a few rows are faster in it than in bf16; else `products`."""
    return torch.float32 if device.type == "cpu" else products


class Stack:
    """The pairs of several adapters on one weight, side by side, in the dtype `products`; for inference.

    Copies A and B when an adapter comes into use, not for every token; the place of one that is no longer used is kept until
    another needs it. Pairs of a smaller rank are filled up with zeros.
    """

    def __init__(self, pairs: dict[str, LoraPair], products: torch.dtype) -> None:
        factors = [pair.factors() for pair in pairs.values()]
        ranks = [A.shape[0] for A, _ in factors]
        first_a, first_b = factors[0]
        self.rank, self.products = max(ranks), products
        self.A = first_a.new_zeros((len(pairs), self.rank, first_a.shape[1]), dtype=products, requires_grad=False)
        self.B = first_b.new_zeros((len(pairs), self.rank, first_b.shape[0]), dtype=products, requires_grad=False)
        self._held: list[tuple[str, LoraPair]] = list(pairs.items())
        self._factors: dict[int, tuple[Tensor, Tensor, int]] = {}  # what was copied, and how often it had been written to
        for place, (_, pair) in enumerate(self._held):
            self._copy(place, pair)
        self.layout: Layout = tuple((name, pair.scale) for name, pair in self._held)

    def take(self, pairs: dict[str, LoraPair]) -> bool:
        """Makes the stack hold `pairs`, copying only those that are new; False where a stack made anew is the better way.

        That is where too few places are free, a rank is too large, or most places would be empty.
        """
        held = dict(self._held)
        new = [(name, pair) for name, pair in pairs.items() if held.get(name) is not pair]
        for place, (A, B, version) in self._factors.items():
            if version >= 0 and A._version + B._version != version:  # trained, or loaded anew, since it was copied
                self._copy(place, self._held[place][1])
        if not new:
            return len(held) <= 2 * len(pairs)
        free = [place for place, (name, pair) in enumerate(self._held) if pairs.get(name) is not pair]
        if len(new) > len(free) or len(held) > 2 * len(pairs) or any(pair.factors()[0].shape[0] > self.rank for _, pair in new):
            return False
        for place, (name, pair) in zip(free, new, strict=False):
            self._held[place] = name, pair
            self._copy(place, pair)
        self.layout = tuple((name, pair.scale) for name, pair in self._held)
        return True

    def _copy(self, place: int, pair: LoraPair) -> None:
        counted = not (pair.A.is_inference() or pair.B.is_inference())  # torch counts no writing to tensors of inference mode
        self._factors[place] = pair.A, pair.B, pair.A._version + pair.B._version if counted else -1
        A, B = (factor.detach() for factor in pair.factors())
        rank = A.shape[0]
        self.A[place, :rank].copy_(A)
        self.B[place, :rank].copy_(B.t())
        if rank < self.rank:
            self.A[place, rank:].zero_()
            self.B[place, rank:].zero_()

    def add(self, y: Tensor, x: Tensor, table: Table) -> Tensor:
        """Adds to `y` (tokens, out), in place, what the pairs give the tokens of `x` (tokens, in), whatever their dtype."""
        return add_stacked(y, x, self.A, self.B, *table)
