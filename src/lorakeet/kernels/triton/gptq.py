"""GPTQ weights as Triton kernels read them (kernels/triton/tiles). **Not run on a GPU yet.**

Each word is read once and expanded to its codes; 3-bit codes, some of which span two words, are read one by one. The kernel finds
from g_idx whether the columns of a tile share a group: then scale and zero point are read once a row, else (desc_act) for every
number. The host does not need to know.
"""

import triton
import triton.language as tl
from torch import Tensor

from lorakeet.kernels.tiled_weight import TiledWeight

# Codes of three bits lie across words, so a tile of them takes twice the shared memory: three would not fit on 8.6, 8.9 and 12.0.
STAGES = {3: 2}


def gptq_tiles(buffers: tuple[Tensor, ...], shape: tuple[int, int], bits: int, zero_less_one: bool) -> TiledWeight:
    """W (out, in) from qweight, qzeros, scales and g_idx; `zero_less_one` for checkpoints of format "gptq"."""
    return TiledWeight(gptq_tile, buffers, shape, (bits, int(zero_less_one)), STAGES.get(bits, 3))


@triton.jit
def gptq_tile(weight, rows, start, HOW: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile as kernels/triton/tiles defines it. 32-bit indices reach every word of a matrix of 2³⁴ numbers."""
    qweight, qzeros, scales, g_idx = weight[0], weight[1], weight[2], weight[3]
    BITS: tl.constexpr = HOW[0]
    LESS_ONE: tl.constexpr = HOW[1]
    columns = start + tl.arange(0, COLUMNS)
    row = rows[:, None]
    known = (row < OUT) & (columns < IN)[None, :]
    if BITS == 3:
        codes = _field(qweight + row, columns[None, :] * BITS, OUT, known, BITS, 0)
    else:
        EACH: tl.constexpr = 32 // BITS
        words = start // EACH + tl.arange(0, COLUMNS // EACH)
        there = (row < OUT) & (words < IN // EACH)[None, :]
        packed = tl.load(qweight + (words[None, :] * OUT + row), mask=there, other=0)
        spread = packed[:, :, None] >> (BITS * tl.arange(0, EACH))[None, None, :]  # the sign that >> extends is masked away
        codes = tl.reshape(spread & ((1 << BITS) - 1), (rows.shape[0], COLUMNS))
    groups = tl.load(g_idx + tl.minimum(columns, IN - 1))
    lowest = tl.min(groups, 0)
    if lowest == tl.max(groups, 0):
        values = _values(codes, scales, qzeros, lowest, row, row < OUT, OUT, BITS, LESS_ONE)
    else:
        values = _values(codes, scales, qzeros, groups[None, :], row, known, OUT, BITS, LESS_ONE)
    return values


@triton.jit
def _values(
    codes, scales, qzeros, group, row, known, OUT: tl.constexpr, BITS: tl.constexpr, LESS_ONE: tl.constexpr
):  # fmt: skip
    """scale · (code − zero), for `group` and `row` where `known`."""
    scale = tl.load(scales + (group * OUT + row), mask=known, other=0.0)
    zero = _field(qzeros + group * (OUT * BITS // 32), row * BITS, 1, known, BITS, LESS_ONE)
    return (codes - zero).to(tl.float32) * scale.to(tl.float32)


@triton.jit
def _field(stream, bit, stride: tl.constexpr, known, BITS: tl.constexpr, LESS_ONE: tl.constexpr):
    """The field of BITS bits at `bit` of a stream of 32-bit words with a stride; LESS_ONE as in quant/gptq."""
    shift = bit % 32
    word = tl.load(stream + (bit // 32) * stride, mask=known, other=0)
    if BITS == 3:
        over = shift > 32 - BITS
        further = tl.load(stream + (bit // 32 + 1) * stride, mask=known & over, other=0)  # 0 where the field is within one word
        code = (word.to(tl.uint32, bitcast=True) >> shift).to(tl.int32, bitcast=True) | (further << ((32 - shift) % 32))
        if LESS_ONE:
            code = (code & ((1 << BITS) - 1)) + 1
    else:
        if LESS_ONE:  # 1 was subtracted from the whole word, so a zero point of 0 borrowed from the field above it
            ones: tl.constexpr = 0x11111111 if BITS == 4 else (0x01010101 if BITS == 8 else 0x55555555)
            word = tl.add(word, ones, sanitize_overflow=False)
        code = word >> shift
    return code & ((1 << BITS) - 1)
