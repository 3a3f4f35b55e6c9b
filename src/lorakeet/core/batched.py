"""One pass over a frozen base whose tokens use different pairs: some adapter, none, or a weighted mix of several.

        x ──┬── frozen base: x·Wᵀ ──────────────────────────────────── y
            ├── tokens of share 1:  w₁·s₁ · x·A₁ᵀ·B₁ᵀ ── added to its part of y
            └── tokens of share 2:  w₂·s₂ · x·A₂ᵀ·B₂ᵀ ── added to its part of y       (shares may overlap: a mix)

Two ways give the same numbers to rounding. Share by share is differentiable and costs some products for each share. Stacked, for
inference, each mix has a place in one table of A's and one of B's where its pairs stand, and tokens that are written one by one
pick their rows of it, for layers that see the same x: the number of products does not depend on the number of adapters.
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
from lorakeet.core.gathered import row_dots, row_sums
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import add_low_rank, grad_of_b, shrink_grad
from lorakeet.core.selection import Arrangement, Mix, Selection, Share, Standing


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


Mixture = Sequence[tuple[LoraPair, float]]  # the pairs of a mix on one layer, with weights
Held = Sequence[Mapping[str, LoraPair]]  # the pairs of some layers, each by adapter


@dataclass(frozen=True)
class _Copy:
    """What stands at a place, and the trainable tensors that it was copied from, with how often these had been written to by
    then. Frozen ones are not written to."""

    what: Standing
    tensors: tuple[weakref.ref[Tensor], ...]
    written: int

    @classmethod
    def of(cls, what: Standing, layers: Sequence[Mixture]) -> _Copy:
        factors: list[Tensor] = [factor for mixture in layers for pair, _ in mixture for factor in (pair.A, pair.B)]
        tensors = tuple(weakref.ref(factor) for factor in factors if factor.requires_grad and not factor.is_inference())
        return cls(what, tensors, _written(tensors))

    def stands_for(self, what: Standing) -> bool:
        """Whether this is still a copy of that."""
        return self.what == what and self.written == _written(self.tensors)


@dataclass(frozen=True)
class _Picks:
    """Which rows of a stack's tables the tokens pick that are computed one by one; layer by layer, in the order of tokens.

    `tokens` and `rows` (n,): x[tokens[i]] meets the row rows[i] of all A's. A layer has its part of these n, and, within its B's,
    the rows for them, and where each token's begin.
    """

    tokens: Tensor
    rows: Tensor
    layers: tuple[tuple[slice, Tensor, Tensor], ...]

    @classmethod
    def of(cls, to: Arrangement, parts: Sequence[slice], ranks: Mapping[int, Sequence[int]], device: torch.device) -> _Picks:
        tokens: list[int] = []
        rows: list[int] = []
        layers, width = [], parts[-1].stop
        for layer, part in enumerate(parts):
            own: list[int] = []
            first, firsts, room = len(tokens), [], part.stop - part.start
            for token, place in to.at:
                rank = ranks[place][layer]
                firsts.append(len(own))
                own += range(place * room, place * room + rank)
                begin = place * width + part.start
                rows += range(begin, begin + rank)
                tokens += [token] * rank
            layers.append((slice(first, len(tokens)), _numbers(own, device), _numbers(firsts, device)))
        return cls(_numbers(tokens, device), _numbers(rows, device), tuple(layers))


class Stack:
    """The pairs of several adapters on layers that see the same x, side by side by the places of an Arrangement; for inference.

    A place holds its mix as one pair for each layer: A's one below the other, the B's with weight and scale in them, filled up
    with zeros to the largest rank of the layer. All A's are one tensor (P, ranks of all layers, in), so that one product shrinks
    x; each layer has its B (P, rank, out). Copies, in the dtype `products`, are made when a mix comes to a place: A and B are
    then rounded as the layers round them for an adapter that all tokens use.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], products: torch.dtype, device: torch.device) -> None:
        """For weights of `shapes` (out, in); nothing is held yet."""
        self.shapes, self.products, self.device = tuple(shapes), products, device
        self.special: set[int] = set()  # places of mixes some of whose layers' pairs are more than A and B; these are not held
        self._ranks: dict[int, tuple[int, ...]] = {}  # by place, of each layer
        self._copies: dict[int, _Copy] = {}  # by place
        self._make(0, tuple(0 for _ in shapes))

    @property
    def empty(self) -> bool:
        """Whether no mix has a pair here."""
        return not self.A.shape[1]

    def hold(self, to: Arrangement, pairs: Held, selection: Selection) -> None:
        """Makes each place that is used hold its mix of `pairs`; an adapter without a pair here adds nothing.

        Copies what is not there, or was copied before an adapter came or left, or was trained since.
        """
        wanted = selection.standing(to)
        new = [place for place, what in wanted.items() if not self._stands(place, what)]
        held, places = len(self.A), len(to.places)
        if not new and (held // 4 < places <= held or held == places):
            return
        mixtures = {place: _own(to.places[place], pairs) for place in new}
        if self._make_room(places, mixtures):
            mixtures = {place: _own(to.places[place], pairs) for place in wanted}
        for place, layers in mixtures.items():
            self._copies.pop(place, None)  # should the copying fail, nobody takes what is there for a copy
            self._copy(place, layers)
            self._copies[place] = _Copy.of(wanted[place], layers)

    def _stands(self, place: int, what: Standing) -> bool:
        known = self._copies.get(place)
        return known is not None and known.stands_for(what)

    def add(self, ys: Sequence[Tensor], x: Tensor, to: Arrangement) -> None:
        """Adds to each layer's y (tokens, out), in place, what the places give the tokens of `x` (tokens, in)."""
        wide = x.to(self.products)
        for part, place in to.long:
            narrow = torch.mm(wide[part], self.A[place].t())
            for y, ranks, B in zip(ys, self._parts, self.Bs, strict=True):
                added = torch.mm(narrow[:, ranks], B[place]).to(y.dtype)
                y[part].add_(added) if isinstance(part, slice) else y.index_add_(0, part, added)
        if not to.at:
            return
        picks = self._picks(to)
        if not len(picks.rows):
            return
        shrunk = row_dots(wide, picks.tokens, self.A.flatten(0, 1), picks.rows)
        for y, B, (part, rows, firsts) in zip(ys, self.Bs, picks.layers, strict=True):
            if not len(rows):
                continue
            found = row_sums(shrunk[part], B.flatten(0, 1), rows, firsts).to(y.dtype)
            y.add_(found) if to.tokens is None else y.index_add_(0, to.tokens, found)

    def _picks(self, to: Arrangement) -> _Picks:
        """Worked out once for all stacks whose places have the same ranks."""
        key = tuple((part.start, part.stop) for part in self._parts), tuple(self._ranks[place] for _, place in to.at)
        found = to.picked.get(key)
        if found is None:
            found = to.picked[key] = _Picks.of(to, self._parts, self._ranks, self.device)
        return cast(_Picks, found)

    def _make_room(self, places: int, mixes: Mapping[int, Sequence[Mixture]]) -> bool:
        """Notes the ranks of the new `mixes`; whether there had to be new tensors, so that everything is to be copied again."""
        for place, layers in mixes.items():
            plain = all(map(_plain, layers))
            (self.special.discard if plain else self.special.add)(place)
            self._ranks[place] = tuple(
                sum(len(pair.factors()[0]) for pair, _ in mixture) if _plain(mixture) else 0 for mixture in layers
            )
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
            for pair, weight in mixture if _plain(mixture) else ():
                a, b = (factor.detach() for factor in pair.factors())
                last = first + len(a)
                below[first:last].copy_(a)
                torch.mul(b.t(), pair.scale * weight, out=beside[first:last])
                first = last
            if first < len(below):
                below[first:].zero_()
                beside[first:].zero_()


def _numbers(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _own(mix: Mix, pairs: Held) -> list[Mixture]:
    """The pairs of a mix, for each layer."""
    return [[(held[name], weight) for name, weight in mix if name in held] for held in pairs]


def _plain(mixture: Mixture) -> bool:
    return all(pair.plain for pair, _ in mixture)


def _written(tensors: Iterable[weakref.ref[Tensor]]) -> int:
    """How often the tensors have been written to in place."""
    return sum(tensor._version for known in tensors if (tensor := known()) is not None)
