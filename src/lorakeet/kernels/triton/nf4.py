"""NF4 weights as Triton kernels multiply them (kernels/triton/tiles). **Not run on a GPU yet.**

For few tokens, alone or with a pair: no library multiplies more than 4 tokens by NF4 weights as they are stored, or adds a pair.
bitsandbytes dequantises them (kernels/bitsandbytes_nf4).

A byte holds two neighbours of a row. A run of RUN columns is within one block; RUN is the greatest power of two that divides the
width, the block and the columns of the tile. So a tile is a table of bytes, expanded to two levels each, times a table of largest
absolute values, one for each run, which are dequantised by quant/nf4's formula.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from lorakeet.kernels.tiled_weight import TiledWeight


def nf4_tiles(
    buffers: tuple[Tensor, ...], tables: tuple[Tensor, Tensor], shape: tuple[int, int], *, block: int
) -> TiledWeight:
    """W (out, in), of an even width, from packed, absmax, and with double quantisation scales and mean; `tables` are the 16
    levels and the 256 of absmax."""
    packed, absmax, *double = buffers
    run = math.gcd(shape[1], block)
    held = (packed, absmax, tables[0], tables[1], *(double or (absmax, absmax)))
    return TiledWeight(nf4_tile, held, shape, (block, run, int(bool(double))))


@triton.jit
def nf4_tile(weight, rows, start, HOW: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile as kernels/triton/tiles defines it."""
    packed, absmax, levels, dynamic, scales, mean = weight[0], weight[1], weight[2], weight[3], weight[4], weight[5]
    BLOCK: tl.constexpr = HOW[0]
    RUN: tl.constexpr = HOW[1] if HOW[1] < COLUMNS else COLUMNS
    COUNT: tl.constexpr = OUT * IN
    DOUBLE: tl.constexpr = HOW[2]
    begin = rows.to(tl.int64)[:, None] * IN  # index in W of each row's first element
    column = start + 2 * tl.arange(0, COLUMNS // 2)[None, :]
    known = begin + column < COUNT  # beyond a row's last column is the next row, which is not used
    byte = tl.load(packed + (begin + column) // 2, mask=known, other=0x77).to(tl.int32)  # 7 is the code of 0
    pairs = tl.interleave(tl.load(levels + (byte >> 4)), tl.load(levels + (byte & 15)))
    column = start + RUN * tl.arange(0, COLUMNS // RUN)[None, :]
    known = begin + column < COUNT
    block = (begin + column) // BLOCK
    if DOUBLE:
        code = tl.load(absmax + block, mask=known, other=0).to(tl.int32)
        largest = tl.load(dynamic + code) * tl.load(scales + block // 256, mask=known, other=0.0) + tl.load(mean)
    else:
        largest = tl.load(absmax + block, mask=known, other=0.0)
    runs = tl.reshape(pairs, (rows.shape[0], COLUMNS // RUN, RUN)) * largest[:, :, None]
    return tl.reshape(runs, (rows.shape[0], COLUMNS))
