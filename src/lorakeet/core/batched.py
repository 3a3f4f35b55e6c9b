"""One pass over a frozen base whose tokens use different pairs: some adapter, none, or a weighted mix of several.

        x ──┬── frozen base: x·Wᵀ ──────────────────────────────────── y
            ├── tokens of share 1:  w₁·s₁ · x·A₁ᵀ·B₁ᵀ ── added to its part of y
            └── tokens of share 2:  w₂·s₂ · x·A₂ᵀ·B₂ᵀ ── added to its part of y       (shares may overlap: a mix)

Two ways give the same numbers to rounding. Share by share is differentiable and costs some products for each share. Stacked, for
inference, each share has a place in one A and one B where its pairs stand, and all tokens that are written one by one are
multiplied at once, for layers that see the same x: the number of products does not depend on the number of adapters.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lorakeet.core.base import FrozenBase
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import add_low_rank, grad_of_b, shrink_grad, stacked_grow, stacked_shrink
from lorakeet.core.selection import Arrangement, Mix, Share


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


Mixture = Sequence[tuple[LoraPair, float]]  # the pairs of a mix on one layer, with weights
Held = Sequence[Mapping[str, LoraPair]]  # the pairs of some layers, each by adapter


@dataclass(frozen=True)
class _Copy:
    """What stands at a place: a mix, and which pairs it was copied from, with how often they had been written to by then."""

    mix: Mix
    pairs: tuple[weakref.ref[LoraPair], ...]
    tensors: tuple[weakref.ref[Tensor], ...]
    written: int

    @classmethod
    def of(cls, mix: Mix, layers: Sequence[Mixture]) -> _Copy:
        pairs = [pair for mixture in layers for pair, _ in mixture]
        factors: list[Tensor] = [factor for pair in pairs for factor in (pair.A, pair.B)]
        tensors = tuple(weakref.ref(factor) for factor in factors if not factor.is_inference())  # those are not counted
        return cls(mix, tuple(map(weakref.ref, pairs)), tensors, _written(tensors))

    def stands_for(self, mix: Mix, pairs: Held) -> bool:
        """Whether this is still a copy of the `mix` of `pairs`."""
        if self.mix != mix or self.written != _written(self.tensors):
            return False
        own = [held[name] for held in pairs for name, _ in mix if name in held]
        return len(own) == len(self.pairs) and all(known() is pair for known, pair in zip(self.pairs, own, strict=True))


class Stack:
    """The pairs of several adapters on layers that see the same x, side by side by the places of an Arrangement; for inference.

    A place holds its mix as one pair for each layer: A's one below the other, the B's with weight and scale in them, filled up
    with zeros to the largest rank of the layer. All A's are one tensor (P, ranks of all layers, in), so that one product shrinks
    x; each layer has its B (P, rank, out). Copies, in the dtype `products`, are made when a mix comes to a place.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], products: torch.dtype, device: torch.device) -> None:
        """For weights of `shapes` (out, in); nothing is held yet."""
        self.shapes, self.products, self.device = tuple(shapes), products, device
        self.special: set[int] = set()  # places of mixes with pairs that are more than A and B, which are not held
        self._ranks: dict[int, tuple[int, ...]] = {}  # by place, of each layer
        self._copies: dict[int, _Copy] = {}  # by place
        self._changes, self._written = -1, 0
        self._make(0, tuple(0 for _ in shapes))
        self._held_a, self._held_b = self.A, list(zip(self._parts, self.Bs, strict=True))  # of the places that are held

    @property
    def empty(self) -> bool:
        """Whether no mix has a pair here."""
        return not self.A.shape[1]

    def hold(self, places: tuple[Mix, ...], pairs: Held, changes: int) -> None:
        """Makes each place hold its mix of `pairs`; an adapter without a pair here adds nothing. Copies what is not there.

        `changes` counts how often adapters have come or gone: as long as it stays, and nothing is written to, names say enough.
        """
        named = changes == self._changes and self._written == sum(_written(copy.tensors) for copy in self._copies.values())
        new = [place for place, mix in enumerate(places) if not self._stands(place, mix, None if named else pairs)]
        mixtures = {place: _own(places[place], pairs) for place in new}
        if self._make_room(len(places), mixtures):
            mixtures = {place: _own(mix, pairs) for place, mix in enumerate(places)}
        for place, layers in mixtures.items():
            self._copies.pop(place, None)  # should the copying fail, nobody takes what is there for a copy
            self._copy(place, layers)
            self._copies[place] = _Copy.of(places[place], layers)
        self._changes, self._written = changes, sum(copy.written for copy in self._copies.values())
        self._held_a = self.A[: len(places)]
        self._held_b = [(ranks, B[: len(places)]) for ranks, B in zip(self._parts, self.Bs, strict=True)]

    def _stands(self, place: int, mix: Mix, pairs: Held | None) -> bool:
        """Whether the mix stands there, of these `pairs` if there is doubt of it."""
        known = self._copies.get(place)
        return known is not None and (known.mix == mix if pairs is None else known.stands_for(mix, pairs))

    def add(self, ys: Sequence[Tensor], x: Tensor, to: Arrangement) -> None:
        """Adds to each layer's y (tokens, out), in place, what the places give the tokens of `x` (tokens, in)."""
        wide = x.to(self.products)
        if to.aligned:
            shrunk = stacked_shrink(wide.unsqueeze(1), self._held_a)
            for y, (ranks, B) in zip(ys, self._held_b, strict=True):
                y.add_(stacked_grow(shrunk[..., ranks], B).squeeze(1).to(y.dtype))
            return
        for part, place in to.long:
            narrow = torch.mm(wide[part], self._held_a[place].t())
            for y, (ranks, B) in zip(ys, self._held_b, strict=True):
                added = torch.mm(narrow[:, ranks], B[place]).to(y.dtype)
                y[part].add_(added) if isinstance(part, slice) else y.index_add_(0, part, added)
        if len(to.tokens):
            shrunk = stacked_shrink(wide.index_select(0, to.seen).unsqueeze(1), self._held_a)
            for y, (ranks, B) in zip(ys, self._held_b, strict=True):
                found = stacked_grow(shrunk[..., ranks], B).squeeze(1).index_select(0, to.at)
                y.index_add_(0, to.tokens, found.to(y.dtype))

    def _make_room(self, places: int, mixes: Mapping[int, Sequence[Mixture]]) -> bool:
        """Notes the ranks of the new `mixes`; whether there had to be new tensors, so that everything is to be copied again."""
        for place, layers in mixes.items():
            plain = all(pair.plain for mixture in layers for pair, _ in mixture)
            (self.special.discard if plain else self.special.add)(place)
            self._ranks[place] = tuple(sum(len(pair.factors()[0]) for pair, _ in mixture) if plain else 0 for mixture in layers)
        for place in [place for place in self._ranks if place >= places]:
            del self._ranks[place]
            self._copies.pop(place, None)
            self.special.discard(place)
        ranks = tuple(max(own) for own in zip(*self._ranks.values(), strict=True)) or tuple(0 for _ in self.shapes)
        held = tuple(part.stop - part.start for part in self._parts)
        fits = all(new <= old for new, old in zip(ranks, held, strict=True)) and 2 * sum(ranks) > sum(held)
        if (fits or ranks == held) and len(self.A) // 4 < places <= len(self.A):
            return False
        self._make(1 << (places - 1).bit_length() if places else 0, ranks)
        return True

    def _make(self, places: int, ranks: tuple[int, ...]) -> None:
        """Room for `places` mixes, each of at most such a rank for each layer."""
        ends = [0, *itertools.accumulate(ranks)]
        with torch.inference_mode(False):  # else nobody could copy to them outside of it
            zeros = partial(torch.zeros, dtype=self.products, device=self.device)
            A = zeros(places, ends[-1], self.shapes[0][1])
            Bs = [zeros(places, rank, out) for rank, (out, _) in zip(ranks, self.shapes, strict=True)]
        self._copies.clear()
        self._parts = [slice(first, last) for first, last in itertools.pairwise(ends)]  # of the rank side, by layer
        self.A, self.Bs = A, Bs

    def _copy(self, place: int, layers: Sequence[Mixture]) -> None:
        for ranks, B, mixture in zip(self._parts, self.Bs, layers, strict=True):
            below, beside, first = self.A[place, ranks], B[place], 0
            for pair, weight in () if place in self.special else mixture:
                a, b = (factor.detach() for factor in pair.factors())
                last = first + len(a)
                below[first:last].copy_(a)
                beside[first:last].copy_(b.t()).mul_(pair.scale * weight)
                first = last
            if first < len(below):
                below[first:].zero_()
                beside[first:].zero_()


def _own(mix: Mix, pairs: Held) -> list[Mixture]:
    """The pairs of a mix, for each layer."""
    return [[(held[name], weight) for name, weight in mix if name in held] for held in pairs]


def _written(tensors: Iterable[weakref.ref[Tensor]]) -> int:
    """How often the tensors have been written to in place; those of inference mode, which torch does not count, are left out."""
    return sum(tensor._version for known in tensors if (tensor := known()) is not None)
