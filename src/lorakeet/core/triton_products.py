"""Products and dequantisation of a frozen weight by Triton kernels, where they are requested (kernels/triton/support).

A base that the kernels can read answers `in_tiles()` (kernels/tiled_weight). Two things are made of that (kernels/triton/tiles):

    unpack     a packed weight into a dense matrix, the same bits as by torch's operations, in one pass
    product    x·Wᵀ + s·(x·Aᵀ)·Bᵀ, or g·W + s·(g·B)·A, with W dequantised tile by tile: W is read once and never written

The second pays while reading W dominates, which is for few tokens (`TritonRequest.tokens`); for more of them W is dequantised
once and multiplied by cuBLAS.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lorakeet.core.base import FrozenBase
from lorakeet.kernels.choose import candidates, first_of
from lorakeet.kernels.tiled_weight import TiledWeight, TritonRequest
from lorakeet.kernels.triton.support import RANK, are_numbers


def dequantises(base: FrozenBase, out: Tensor, buffers: Iterable[Tensor]) -> bool:
    """True if a kernel dequantises W, stored in these buffers, into `out`."""
    if getattr(base, "kernels", None) is None:
        return False
    kernels = candidates("dequantise", out.device, out.dtype, triton=True)
    return first_of(kernels, out, tuple(buffers)).source.endswith(".tiles")


def dequantise_rows(tiles: TiledWeight, out: Tensor, first: int = 0) -> Tensor:
    """Writes rows of W from `first` on into `out`, contiguous, until it is full, each number rounded once; returns it."""
    from lorakeet.kernels.triton.tiles import unpack_tiles as launch

    return launch(tiles, out, first)


def product(base: FrozenBase, x: Tensor, *, transposed: bool = False) -> Tensor | None:
    """x (tokens, in) to x·Wᵀ (tokens, out); `transposed`: x (tokens, out) to x·W (tokens, in). None: another kernel does it."""
    tiles = _tiles("product, quantised weight", base, x)
    if tiles is None:
        return None
    from lorakeet.kernels.triton.tiles import fused_product as launch

    return launch(tiles, x, transposed=transposed)[0]


def low_rank_product(base: FrozenBase, x: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """x (tokens, in), A (rank, in), B (out, rank) to y = x·Wᵀ + s·h·Bᵀ (tokens, out) and h = x·Aᵀ (tokens, rank), all of one
    dtype. None: separate kernels do it.

    Both sums run in fp32; h is rounded to the dtype of x, y once at the end.
    """
    tiles = _tiles("product and pair in one", base, x, A, B) if len(A) <= RANK else None
    if tiles is None:
        return None
    from lorakeet.kernels.triton.tiles import TilePair
    from lorakeet.kernels.triton.tiles import fused_product as launch

    y, shrunk = launch(tiles, x, TilePair(A, B.t(), before=1.0, after=scale))
    assert shrunk is not None
    return y, shrunk


def low_rank_product_t(base: FrozenBase, grad: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """grad g (tokens, out) to g·W + u·A (tokens, in) and u = s·g·B (tokens, rank): the backward pass of `low_rank_product`.

    y is linear in x, y = x·(W + s·B·A)ᵀ, so ∂L/∂x = g·(W + s·B·A) = g·W + (s·g·B)·A. That is the same computation with W read
    along its other side, Bᵀ in the place of A and A in that of Bᵀ; the scale stands before u, which ∂L/∂A = uᵀ·x needs.
    """
    tiles = _tiles("product and pair in one", base, grad, A, B) if len(A) <= RANK else None
    if tiles is None:
        return None
    from lorakeet.kernels.triton.tiles import TilePair
    from lorakeet.kernels.triton.tiles import fused_product as launch

    grad_x, u = launch(tiles, grad, TilePair(B.t(), A, before=scale, after=1.0), transposed=True)
    assert u is not None
    return grad_x, u


def _tiles(task: str, base: FrozenBase, x: Tensor, *factors: Tensor) -> TiledWeight | None:
    """The weight as Triton kernels read it, if one computes the product of x, and of the factors of a pair."""
    request: TritonRequest | None = getattr(base, "kernels", None)
    if request is None:
        return None
    kernel = first_of(candidates(task, x.device, x.dtype, triton=True), x, request.tokens, *factors)
    found: TiledWeight | None = base.in_tiles() if kernel.source.endswith(".tiles") else None  # type: ignore[attr-defined]
    return found if found is not None and are_numbers(*found.tensors) else None
