"""Products with the rows of a large frozen matrix, tile by tile, so that the matrix need not be in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakeet.core.base import frozen_product

TILE = 8192  # rows: 67 MB in bf16 for a Llama-2 7B's head
PART = 1 << 22  # elements of two tensors that are compared at once


class RowSource(Protocol):
    """A matrix whose rows can be read in parts: a tensor, or one in a store."""

    @property
    def shape(self) -> Any:
        """(rows, columns)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the elements."""

    def __getitem__(self, part: slice, /) -> Tensor:
        """Reads some of the rows."""


class StackedRows(RowSource, Protocol):
    """Rows that may have more than two dimensions, such as a tensor in a file."""

    def as_matrix(self) -> RowSource:
        """The same numbers with all dimensions but the last flattened into rows."""


def tiles(rows: int, tile: int = TILE) -> Iterator[slice]:
    """Slices of at most `tile` rows, end to end."""
    for start in range(0, rows, tile):
        yield slice(start, min(start + tile, rows))


def parts(shape: tuple[int, ...], numbers: int = PART) -> Iterator[slice]:
    """Slices of the first dimension of a tensor of `shape` that hold about so many numbers each, end to end."""
    yield from tiles(shape[0], max(1, numbers // max(math.prod(shape[1:]), 1)))


def as_matrix(rows: RowSource) -> RowSource:
    """The same numbers with all dimensions but the last flattened into rows.

    What a part of a stack of matrices holds is then no more than that of a matrix. Vectors and matrices are left as they are.
    """
    shape = tuple(rows.shape)
    if len(shape) < 3:
        return rows
    return rows.reshape(matrix_shape(shape)) if isinstance(rows, Tensor) else cast(StackedRows, rows).as_matrix()


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `as_matrix` of a tensor of `shape`."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 2 else shape


class _TiledProduct(torch.autograd.Function):
    """y = x·Wᵀ and ∂x = ∂y·W, both by tiles of W; ∂x is summed in fp32. Nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: RowSource) -> Tensor:
        ctx.weight = weight
        return torch.cat([frozen_product(x, weight[part]) for part in tiles(weight.shape[0])], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return back_product(grad, ctx.weight, grad.dtype).to(grad.dtype), None


def tiled_product(x: Tensor, weight: RowSource) -> Tensor:
    """x (n, columns) to x·Wᵀ (n, rows) in the dtype of x, differentiable in x."""
    return cast(Tensor, _TiledProduct.apply(x, weight))  # type: ignore[no-untyped-call]


def back_product(grad: Tensor, weight: RowSource, products: torch.dtype) -> Tensor:
    """grad (n, rows) to grad·W (n, columns): each tile's product in `products`, their sum in fp32 (fp64 for fp64)."""
    exact = torch.promote_types(products, torch.float32)
    total = torch.zeros((grad.shape[0], weight.shape[1]), dtype=exact, device=grad.device)
    add_back_products(total, ((part, grad[:, part].to(products).contiguous()) for part in tiles(weight.shape[0])), weight)
    return total


def add_back_products(total: Tensor, grads: Iterable[tuple[slice, Tensor]], weight: RowSource) -> None:
    """Adds grad·W to `total` (n, columns), in place, tile by tile, from the gradient (n, ·) of each tile's rows."""
    for part, grad in grads:
        total += frozen_product(grad, weight[part], across=True)
        del grad  # frees it before the next one is made
