"""Triton kernels over a frozen weight that is read tile by tile, in any storage. **Not run on a GPU yet.**

One function knows how W is stored; every kernel takes it as an argument:

    load(weight, rows, start, HOW, OUT, IN, COLUMNS)      → (rows, COLUMNS); finite numbers outside of W, which are not used

`weight` are the pointers and HOW the numbers of `TiledWeight`, `rows` a vector of row numbers, `start` the first column, a
multiple of COLUMNS. `dense_tile` loads plain matrices; kernels/triton/nf4 and gptq load packed ones. These files are imported
only if Triton kernels are requested, since Triton is optional. Their annotations are no strings: its interpreter reads them.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from lorakeet.kernels.protocol import QuantisedWeight
from lorakeet.kernels.tiled_weight import TiledWeight
from lorakeet.kernels.triton.support import are_numbers

UNPACKED = 4096  # elements that a program dequantises, at most 128 columns of W
# A product and the sum after it are rounded separately, as in torch; the compiler would fuse them.
EXACT = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class TilePair:
    """What a product adds: after · round(before · x·shrinkᵀ) · expand, shrink (rank, depth), expand (rank, width)."""

    shrink: Tensor
    expand: Tensor
    before: float
    after: float


@dataclass(frozen=True)
class TileSizes:
    """Tile sizes of a product: tokens, rows and columns of W, pipeline stages, and warps of a program."""

    tokens: int
    rows: int
    columns: int
    stages: int
    warps: int


def tile_sizes(tokens: int, itemsize: int, *, transposed: bool) -> TileSizes:
    """Narrow tiles for few tokens, so that all processors of a GPU have programs. Reasoned, not measured.

    Shared memory (x, A and W of every stage) stays below 99 KB, the least of GPUs since 2020. fp32 has no exact tensor cores, so
    its products are unrolled element by element, in small tiles.
    """
    if itemsize == 4:
        return TileSizes(16, 32, 32, stages=2, warps=4)
    height = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    across, warps = (32, 4) if tokens <= 16 else (64, 8)  # the side of W along which programs are split
    rows, columns = (64, across) if transposed else (across, 64)
    return TileSizes(height, rows, columns, stages=3, warps=warps)


def dequantise_into(weight: QuantisedWeight, out: Tensor, first: int) -> bool:
    """See kernels/protocol.Dequantiser: the same bits as by torch's operations, in one pass."""
    tiles = weight.tiles_to_dequantise()
    if tiles is not None:
        unpack_tiles(tiles, out, first)
    return tiles is not None


def quantised_product(weight: QuantisedWeight, x: Tensor, across: bool) -> Tensor | None:
    """See kernels/protocol.QuantisedProducts: W is dequantised tile by tile, so it is read once and never written.

    It pays while reading W dominates, which is for few tokens (`TritonRequest.tokens`); for more of them W is dequantised once
    and multiplied by cuBLAS.
    """
    tiles = _readable_tiles(weight)
    return None if tiles is None else fused_product(tiles, x, transposed=across)[0]


def add_quantised_product(weight: QuantisedWeight, to: Tensor, x: Tensor, across: bool) -> bool:
    """See kernels/protocol.QuantisedProducts; the product is rounded before it is added."""
    found = quantised_product(weight, x, across)
    if found is not None:
        to.add_(found)
    return found is not None


def product_and_pair(weight: Any, x: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """See kernels/protocol.FusedPair: both sums run in fp32; h is rounded to the dtype of x, y once at the end."""
    tiles = _readable_tiles(weight)
    return None if tiles is None else fused_product(tiles, x, TilePair(A, B.t(), before=1.0, after=scale))  # type: ignore[return-value]


def product_and_pair_t(weight: Any, grad: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """See kernels/protocol.FusedPair: the backward pass of `product_and_pair`.

    y is linear in x, y = x·(W + s·B·A)ᵀ, so ∂L/∂x = g·(W + s·B·A) = g·W + (s·g·B)·A. That is the same computation with W read
    along its other side, Bᵀ in the place of A and A in that of Bᵀ; the scale stands before u, which ∂L/∂A = uᵀ·x needs.
    """
    tiles, pair = _readable_tiles(weight), TilePair(B.t(), A, before=scale, after=1.0)
    return None if tiles is None else fused_product(tiles, grad, pair, transposed=True)  # type: ignore[return-value]


def _readable_tiles(weight: Any) -> TiledWeight | None:
    """The weight in tiles, unless it has none, or they belong to a trace."""
    found: TiledWeight | None = weight.in_tiles()
    return found if found is not None and are_numbers(*found.tensors) else None


def unpack_tiles(tiles: TiledWeight, out: Tensor, first: int = 0) -> Tensor:
    """Dequantises rows of W from `first` on into `out`, contiguous, until it is full; returns it."""
    width = tiles.shape[1]
    columns = min(128, triton.next_power_of_2(width))
    rows = UNPACKED // columns
    grid = triton.cdiv(triton.cdiv(out.numel(), width), rows), triton.cdiv(width, columns)
    with on_device(out.device):
        _unpack[grid](
            out, _pointers(tiles), first, out.numel(), tiles.load, tiles.how, *tiles.shape, rows, columns, num_warps=4, **EXACT
        )
    return out


def fused_product(
    tiles: TiledWeight, x: Tensor, pair: TilePair | None = None, *, transposed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x (tokens, depth) to x·Wᵀ, or x·W if `transposed`, (tokens, width), plus `pair`; and before · x·shrinkᵀ."""
    out, inner = tiles.shape
    depth, width = (out, inner) if transposed else (inner, out)
    if x.shape[1] != depth:
        raise ValueError(f"x is {tuple(x.shape)}, but the weight takes (tokens, {depth})")
    x = x.contiguous()
    tokens = len(x)
    blocks = tile_sizes(tokens, x.element_size(), transposed=transposed)
    y = x.new_empty(tokens, width)
    rank = 0 if pair is None else len(pair.shrink)
    shrink, expand = (x, x) if pair is None else (pair.shrink, pair.expand)  # not read without a pair
    shrunk = x.new_empty(tokens, rank) if rank else None
    grid = triton.cdiv(width, blocks.columns if transposed else blocks.rows), triton.cdiv(tokens, blocks.tokens)
    with on_device(x.device):
        _product[grid](
            y, x if shrunk is None else shrunk, x, _pointers(tiles), tokens,
            shrink, *shrink.stride(), expand, *expand.stride(),
            1.0 if pair is None else pair.before, 1.0 if pair is None else pair.after,
            tiles.load, tiles.how, out, inner, rank, max(16, triton.next_power_of_2(rank)) if rank else 0,
            transposed, blocks.tokens, blocks.rows, blocks.columns,
            num_warps=blocks.warps, num_stages=min(blocks.stages, tiles.stages), **EXACT,
        )  # fmt: skip
    return y, shrunk


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context in which Triton launches on `device`: it uses torch's current device, which may be another."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def dense_tiles(weight: Tensor) -> TiledWeight:
    """A plain matrix (out, in) with contiguous rows or columns."""
    held = weight.detach() if isinstance(weight, nn.Parameter) else weight
    return TiledWeight(dense_tile, (held,), (held.shape[0], held.shape[1]), held.stride())


def _pointers(tiles: TiledWeight) -> tuple[Tensor, ...]:
    return tuple(tensor.detach() for tensor in tiles.tensors)


@triton.jit
def dense_tile(weight, rows, start, HOW: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a matrix with the strides HOW."""
    columns = start + tl.arange(0, COLUMNS)
    inside = (rows < OUT)[:, None] & (columns < IN)[None, :]
    at = rows.to(tl.int64)[:, None] * HOW[0] + columns.to(tl.int64)[None, :] * HOW[1]
    return tl.load(weight[0] + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["first", "count"])
def _unpack(
    out, weight, first, count,
    load: tl.constexpr, HOW: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of `out`
    start = tl.program_id(1) * COLUMNS
    columns = start + tl.arange(0, COLUMNS)
    values = load(weight, first + rows, start, HOW, OUT, IN, COLUMNS)
    at = rows.to(tl.int64)[:, None] * IN + columns[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=(columns < IN)[None, :] & (at < count))


@triton.jit(do_not_specialize=["tokens", "before", "after"])
def _product(
    y, shrunk, x, weight, tokens,
    shrink, shrink_rank, shrink_depth, expand, expand_rank, expand_width, before, after,
    load: tl.constexpr, HOW: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    TRANSPOSED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    DEPTH: tl.constexpr = OUT if TRANSPOSED else IN
    WIDTH: tl.constexpr = IN if TRANSPOSED else OUT
    STEP: tl.constexpr = ROWS if TRANSPOSED else COLUMNS
    ACROSS: tl.constexpr = COLUMNS if TRANSPOSED else ROWS
    first = tl.program_id(0) * ACROSS
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    across = first + tl.arange(0, ACROSS)
    total = tl.zeros((TOKENS, ACROSS), dtype=tl.float32)
    if RANK > 0:
        rank = tl.arange(0, PADDED)
        narrow = tl.zeros((TOKENS, PADDED), dtype=tl.float32)
    for start in range(0, DEPTH, STEP):
        deep = start + tl.arange(0, STEP)
        here = (token < tokens)[:, None] & (deep < DEPTH)[None, :]
        part = tl.load(x + token.to(tl.int64)[:, None] * DEPTH + deep[None, :], mask=here, other=0.0)
        if TRANSPOSED:
            tile = load(weight, deep, first, HOW, OUT, IN, COLUMNS)
        else:
            tile = tl.trans(load(weight, across, start, HOW, OUT, IN, COLUMNS))
        total = tl.dot(part, tile.to(x.dtype.element_ty), total, input_precision="ieee")
        if RANK > 0:
            at = rank[None, :] * shrink_rank + deep[:, None] * shrink_depth
            known = (rank < RANK)[None, :] & (deep < DEPTH)[:, None]
            narrow = tl.dot(part, tl.load(shrink + at, mask=known, other=0.0), narrow, input_precision="ieee")
    if RANK > 0:
        rounded = (narrow * before).to(x.dtype.element_ty)
        at = rank[:, None] * expand_rank + across[None, :] * expand_width
        known = (rank < RANK)[:, None] & (across < WIDTH)[None, :]
        wide = tl.load(expand + at, mask=known, other=0.0)
        total += tl.dot(rounded, wide, input_precision="ieee") * after
        if tl.program_id(0) == 0:
            place = shrunk + token[:, None] * RANK + rank[None, :]
            tl.store(place, rounded, mask=(token < tokens)[:, None] & (rank < RANK)[None, :])
    there = (token < tokens)[:, None] & (across < WIDTH)[None, :]
    tl.store(y + token.to(tl.int64)[:, None] * WIDTH + across[None, :], total.to(y.dtype.element_ty), mask=there)
