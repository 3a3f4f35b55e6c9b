"""The low-rank path: one autograd function for every frozen base, and the pair that owns A and B.

        x ──┬── frozen base: x·Wᵀ ───────┐
            │                            +──── y          y = x·Wᵀ + b + s·x̃·Aᵀ·Bᵀ
            └── Aᵀ (rank) ── Bᵀ ── ·s ───┘                x̃ = dropout(x)
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakeet.core.adapter import Pair
from lorakeet.core.base import FrozenBase
from lorakeet.core.math import Kind, ScaleRule, alpha_for, delta, fold, term_dims
from lorakeet.core.pair_products import PairProducts, PairSpan
from lorakeet.core.plan import PlanEntry


class LowRankLinear(torch.autograd.Function):
    """y = x·Wᵀ + b + s·x̃·Aᵀ·Bᵀ with a hand-written backward over any FrozenBase.

    With g = ∂L/∂y (tokens, out), h = x̃·Aᵀ (tokens, rank) and u = s·g·B (tokens, rank):

        ∂L/∂B = s·gᵀ·h      ∂L/∂A = uᵀ·x̃      ∂L/∂x̃ = u·A      ∂L/∂x = g·W

    The rank-sized factor is multiplied first, so no (out, in) gradient is ever formed. Saved are x̃ and h, never a
    dequantised weight: the base dequantises W itself in `matmul_t`. ∂L/∂x is skipped where x needs no gradient.
    All products run in `products` (core/precision): x is cast once, y and ∂L/∂x are rounded once to the dtype of x, and the
    gradients of A and B keep their own dtype. A and B may so be kept in fp32 under a bf16 x.
    """

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - apply() takes positional arguments only
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        base: FrozenBase,
        bias: Tensor | None,
        products: torch.dtype,
    ) -> Tensor:
        wide = x.to(products)
        y = base.matmul(wide)
        if bias is not None:
            y.add_(bias)
        pairs = PairProducts([PairSpan(0, len(x), scale)], products)
        shrunk = pairs.add([y], wide if dropped is None else dropped.to(products), (A, B))
        ctx.save_for_backward(x if dropped is None else dropped, *shrunk, A, B)
        ctx.pairs, ctx.base, ctx.has_dropout, ctx.dtype = pairs, base, dropped is not None, x.dtype
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, shrunk, A, B = ctx.saved_tensors
        need_x, need_dropped, need_a, _ = ctx.needs_input_grad[:4]
        pairs: PairProducts = ctx.pairs
        grad, source = grad.to(pairs.products).contiguous(), source.to(pairs.products)
        grad_x = ctx.base.matmul_t(grad) if need_x else None
        to = torch.zeros_like(source) if ctx.has_dropout and need_dropped else None
        through, of_b = pairs.backward(to if ctx.has_dropout else grad_x, [grad], (shrunk,), (A, B))
        of_a = pairs.of_a(through, source, (A, B))[0] if need_a else None
        return _as(grad_x, ctx.dtype), _as(to, ctx.dtype), of_a, of_b[0], None, None, None, None


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def low_rank_linear(
    x: Tensor,
    base: FrozenBase,
    pair: tuple[Tensor, Tensor, float],
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    products: torch.dtype | None = None,
) -> Tensor:
    """x (…, in) to x·Wᵀ + b + scale·dropout(x)·Aᵀ·Bᵀ (…, out) for pair = (A, B, scale); `products` as in core/precision."""
    A, B, scale = pair
    flat = x.reshape(-1, x.shape[-1])
    dropped = nn.functional.dropout(flat, dropout) if dropout > 0 else None
    with _as_given(x):
        y: Tensor = LowRankLinear.apply(flat, dropped, A, B, scale, base, bias, products or x.dtype)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


def _as_given(x: Tensor) -> AbstractContextManager[object]:
    """A context without a trainer's autocast on the CPU, which would change the dtype of some products alone."""
    return torch.autocast("cpu", enabled=False) if x.is_cpu and torch.is_autocast_enabled("cpu") else nullcontext()


def low_rank_by_torch(
    x: Tensor, weight: Tensor, pair: tuple[Tensor, Tensor, float], *, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """`low_rank_linear` over a dense weight (out, in) by torch's own operations, all of one dtype, with torch's own gradients.

    Its backward pass has no Python, which is faster for few tokens, and can be differentiated again. The weight must stay in
    memory until then, so it may not be streamed.
    """
    A, B, scale = pair
    flat = x.reshape(-1, x.shape[-1])
    dropped = nn.functional.dropout(flat, dropout) if dropout > 0 else flat
    shrunk = nn.functional.linear(dropped, A)
    y = nn.functional.linear(flat, weight, bias).addmm_(shrunk, B.t(), alpha=scale)
    return y.view(*x.shape[:-1], y.shape[-1])


class FrozenLinear(torch.autograd.Function):
    """y = x·Wᵀ + b over any FrozenBase, products in `products`; ∂L/∂x = g·W. Nothing but the base is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: FrozenBase, bias: Tensor | None, products: torch.dtype) -> Tensor:
        ctx.base, ctx.products, ctx.dtype = base, products, x.dtype
        y = base.matmul(x.to(products))
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x = ctx.needs_input_grad[0]
        return ctx.base.matmul_t(grad.to(ctx.products).contiguous()).to(ctx.dtype) if need_x else None, None, None, None


def frozen_linear(x: Tensor, base: FrozenBase, *, bias: Tensor | None = None, products: torch.dtype | None = None) -> Tensor:
    """x (…, in) to x·Wᵀ + b (…, out) without a pair."""
    y: Tensor = FrozenLinear.apply(x.reshape(-1, x.shape[-1]), base, bias, products or x.dtype)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


class LoraPair(nn.Module):
    """A and B of one frozen weight. Calling it applies it over a base; `fold` adds it to a weight.

    `anchor_A` and `anchor_B` (PiSSA, OLoRA) are the frozen initial values of A and B: the pair then stands for s·(B·A − B₀·A₀),
    so that the base weight is never touched and any base, quantised or shared, can be used. A run's saved state has these names.
    """

    kind: Kind
    scale: float
    scale_rule: ScaleRule
    dropout: float
    A: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None
    anchor_A: Tensor | None
    anchor_B: Tensor | None

    def __init__(self, entry: PlanEntry, *, device: torch.device | str = "cpu", bias: bool = False) -> None:
        """A and B are zeros; core/batched/frozen_pair makes pairs of given ones."""
        super().__init__()
        # together: nn.Module checks each assignment for a tensor
        vars(self).update(kind=entry.kind, scale=entry.scale, scale_rule=entry.scale_rule, dropout=entry.dropout)
        self._parameters["A"] = nn.Parameter(torch.zeros(entry.shape_a, device=device))
        self._parameters["B"] = nn.Parameter(torch.zeros(entry.shape_b, device=device))
        self._parameters["bias"] = nn.Parameter(torch.zeros(entry.shape_b[0], device=device)) if bias else None
        self._buffers.update(anchor_A=None, anchor_B=None)

    @property
    def plain(self) -> bool:
        """True if this is LoRA alone: no trained magnitude, no bias, no dropout in use."""
        return type(self) is LoraPair and self.bias is None and not (self.training and self.dropout > 0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as used: with initial values A₀ and B₀, [A; A₀] and [B, −B₀], of twice the rank."""
        if self._buffers["anchor_A"] is None:  # plain dicts: every layer needs this in every pass
            held = cast("dict[str, Tensor]", self._parameters)
            return held["A"], held["B"]
        assert self.anchor_A is not None and self.anchor_B is not None
        return torch.cat([self.A, self.anchor_A]), torch.cat([self.B, -self.anchor_B], dim=1)

    def forward(self, x: Tensor, base: FrozenBase, bias: Tensor | None = None, products: torch.dtype | None = None) -> Tensor:
        """x (…, in) to y (…, out) over a linear base."""
        dropout = self.dropout if self.training else 0.0
        y = low_rank_linear(x, base, (*self.factors(), self.scale), bias=bias, dropout=dropout, products=products)
        return y if self.bias is None else y + (self.scale * self.bias).to(y.dtype)

    def delta(self) -> Tensor:
        """ΔW, fp32, in the shape of the frozen weight."""
        A, B = self.factors()
        return delta(A.float(), B.float(), self.scale, self.kind)

    def fold(self, weight: Tensor) -> Tensor:
        """W + ΔW in the dtype of `weight`."""
        return fold(weight.detach(), self.delta().detach().to(weight.device), in_change=True)

    def value(self) -> Pair:
        """A copy as a plain value on the CPU."""
        A, B = (factor.detach().float().cpu().clone().contiguous() for factor in self.factors())
        rank = A.shape[term_dims(self.kind)[0]]  # with initial values twice that of A
        bias = None if self.bias is None else self.bias.detach().float().cpu().clone()
        return Pair(A, B, alpha_for(self.scale, rank, self.scale_rule), self.kind, self.scale_rule, self._magnitude_value(), bias)

    @property
    def rank(self) -> int:
        """The number of rank-one terms of B·A."""
        return self.A.shape[term_dims(self.kind)[0]]

    def keep(self, terms: Tensor) -> None:
        """Cuts A and B permanently to the rank-one terms b_i·a_iᵀ with these indices, ascending; with none of them ΔW is zero.

        The scale stays, and so does what the kept terms compute. A and B stay the same Parameters, so that an optimizer that has
        them has the cut ones; no graph may wait for its backward pass. ValueError for a pair that is more than s·B·A.
        """
        if self.anchor_A is not None or self.bias is not None or self._magnitude_value() is not None:
            raise ValueError("a pair with initial values, a bias or a trained magnitude is not a sum of rank-one terms alone")
        for factor, dim in zip((self.A, self.B), term_dims(self.kind), strict=True):
            factor.grad = None
            factor.data = factor.data.index_select(dim, terms.to(factor.device))

    def load(self, pair: Pair) -> None:
        """Copies the numbers of `pair`, whose shapes must be those of this pair."""
        with torch.no_grad():
            self.A.copy_(pair.A)
            self.B.copy_(pair.B)
            if self.bias is not None and pair.bias is not None:
                self.bias.copy_(pair.bias)

    def _magnitude_value(self) -> Tensor | None:
        return None
