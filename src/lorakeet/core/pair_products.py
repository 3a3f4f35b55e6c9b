"""The low-rank products of pairs in training, each pair on its own rows, beside the products with frozen weights.

    h = x·Aᵀ      y += s·h·Bᵀ            u = s·g·B      ∂x += u·A      ∂B = s·gᵀ·h      ∂A = uᵀ·x

The rank-sized factor is multiplied first, so no (out, in) matrix is ever formed. A C kernel multiplies all pairs of a batch in
one call (kernels/choose.low_rank_products); torch multiplies part by part, with the same result to rounding. On a device it does
so with fewer operations (core/gpu_pairs).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lorakeet.core.gpu_pairs import GpuPairs
from lorakeet.core.math import add_low_rank, grad_of_b, shrink_grad
from lorakeet.kernels.choose import low_rank_products
from lorakeet.kernels.device import is_cpu
from lorakeet.kernels.protocol import LowRankProducts


class PairSpan(NamedTuple):
    """The rows start … stop − 1 of a pair, and its scale; `layer` is the index of the y that it adds to."""

    start: int
    stop: int
    scale: float
    layer: int = 0

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class PairProducts:
    """Pairs on layers with the same input x. `factors` are A and B of each, alternating.

    Consecutive pairs on the same rows form a part, whose A's are multiplied together. `add` chooses the kernel, which `backward`
    and `of_a` use too; without `add` they use torch.
    """

    def __init__(self, places: Sequence[PairSpan], products: torch.dtype, *, in_c: bool = True) -> None:
        """`products` is the dtype of the products; `in_c` False excludes the C kernel."""
        self.places, self.products = tuple(places), products
        self.kernel: LowRankProducts | None = None  # that multiplies all pairs in one call; None: torch
        self.on_gpu: GpuPairs | None = None  # torch on a device
        alike = groupby(range(len(self.places)), lambda pair: self.places[pair][:2])
        self.parts = [(slice(*rows), list(pairs)) for rows, pairs in alike]  # rows, and indices of the pairs
        self._in_c = in_c
        self._numbers = [number for place in self.places for number in (place.start, place.stop, place.layer)]
        self._scales = [place.scale for place in self.places]

    def add(self, ys: Sequence[Tensor], x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Adds s·x·Aᵀ·Bᵀ to each layer's y (tokens, out), in place, for x (tokens, in), both in the dtype of the products.

        Returns the tensors that `backward` needs.
        """
        if not self.places:
            return ()
        self.kernel = low_rank_products(self.products, [x, *ys], factors, self._numbers) if self._in_c and factors else None
        if self.kernel is not None:
            return (self.kernel.TRAINED_PAIRS(list(ys), x, list(factors), self._numbers, self._scales),)
        if not is_cpu(x.device) and factors:
            layers = [place.layer for place in self.places]
            self.on_gpu = GpuPairs(self.parts, self._scales, layers, factors, self.products)
            return self.on_gpu.add(ys, x)
        shrunk: list[Tensor] = []
        for rows, pairs in self.parts:
            together = torch.mm(_part(x, rows), self._all_a(pairs, factors).t())  # (tokens of the part, all its ranks)
            ranks = [len(factors[2 * pair]) for pair in pairs]
            each = torch.split(together, ranks, dim=1) if len(pairs) > 1 else (together,)
            for pair, h in zip(pairs, each, strict=True):
                place = self.places[pair]
                shrunk.append(h.contiguous())
                add_low_rank(_part(ys[place.layer], rows), shrunk[-1], self._b(pair, factors), place.scale)
        return tuple(shrunk)

    def backward(
        self, grad_x: Tensor | None, grads: Sequence[Tensor], shrunk: Sequence[Tensor], factors: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Returns the tensors that `of_a` needs, and ∂B of each pair in its own dtype, from g = ∂L/∂y (tokens, out) of each
        layer.

        Adds u·A to `grad_x` (tokens, in), in place, unless it is None.
        """
        if not self.places:
            return (), []
        if self.kernel is not None:
            given = list(grads), shrunk[0], list(factors), self._numbers, self._scales
            u, of_b = self.kernel.TRAINED_PAIRS_BACKWARD(grad_x, *given)
            return (u,), _cut(of_b, factors[1::2])
        if self.on_gpu is not None:
            return self.on_gpu.backward(grad_x, grads, shrunk)
        through, of_bs = [], []
        for rows, pairs in self.parts:
            us = []
            for pair in pairs:
                place, B = self.places[pair], self._b(pair, factors)
                grad = _part(grads[place.layer], rows)
                us.append(shrink_grad(grad, B, place.scale))
                of_bs.append(grad_of_b(grad, shrunk[pair], place.scale).to(factors[2 * pair + 1].dtype))
            through.append(us[0] if len(us) == 1 else torch.cat(us, dim=1))  # (tokens of the part, all its ranks)
            if grad_x is not None:
                _part(grad_x, rows).addmm_(through[-1], self._all_a(pairs, factors))
        return tuple(through), of_bs

    def of_a(self, through: Sequence[Tensor], x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
        """∂A of each pair, in its own dtype."""
        if not self.places:
            return []
        if self.kernel is not None:
            return _cut(self.kernel.TRAINED_PAIRS_OF_A(through[0], x, list(factors), self._numbers), factors[::2])
        if self.on_gpu is not None:
            return self.on_gpu.of_a(through, x)
        found = [torch.mm(u.t(), _part(x, rows)) for (rows, _), u in zip(self.parts, through, strict=True)]
        return self.split(found, factors)

    def split(self, found: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
        """Splits uᵀ·x of each part (all its ranks, in) into ∂A of each pair."""
        if len(found) == len(self.places):  # a pair each
            return [grad.to(A.dtype) for grad, A in zip(found, factors[::2], strict=True)]
        each: list[Tensor] = []
        for (_, pairs), of_part in zip(self.parts, found, strict=True):
            dtype = factors[2 * pairs[0]].dtype
            alike = all(factors[2 * pair].dtype == dtype for pair in pairs)
            whole = of_part.to(dtype) if alike else of_part  # one cast for all
            each += torch.split(whole, [len(factors[2 * pair]) for pair in pairs])
        return [grad.to(A.dtype) for grad, A in zip(each, factors[::2], strict=True)]

    def _all_a(self, pairs: Sequence[int], factors: Sequence[Tensor]) -> Tensor:
        """The A's stacked (all ranks, in), in the dtype of the products; one cast, since a GPU launches each."""
        held = [factors[2 * pair] for pair in pairs]
        return (held[0] if len(held) == 1 else torch.cat(held)).to(self.products)

    def _b(self, pair: int, factors: Sequence[Tensor]) -> Tensor:
        return factors[2 * pair + 1].to(self.products)


def _part(tensor: Tensor, rows: slice) -> Tensor:
    """The rows of a part; the tensor itself where these are all, since a view of it takes as long as a small product."""
    return tensor if rows.start == 0 and rows.stop == len(tensor) else tensor[rows]


def alternated(of_a: Iterable[Tensor | None], of_b: Iterable[Tensor]) -> list[Tensor | None]:
    """∂A and ∂B of each pair, alternating as in `factors`."""
    return [grad for pair in zip(of_a, of_b, strict=True) for grad in pair]


def _cut(numbers: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cuts `numbers` into tensors with the shapes and dtypes of `like`: views of one tensor if these are fp32."""
    parts = torch.split(numbers, [factor.numel() for factor in like])
    return [part.view(factor.shape).to(factor.dtype) for part, factor in zip(parts, like, strict=True)]
