"""GPTQ's codes in 32-bit words: a stream of `bits` bits a code, lowest bit first, down each column of qweight.

    bit of the stream     0 … bits−1 │ bits … 2·bits−1 │ …            word w holds the bits 32·w … 32·w + 31
    code                  0          │ 1               │ …            32 codes fill `bits` words, also of 3 bits

qzeros holds the zero points in the same way along each row. Checkpoints of format "gptq" store zero − 1, those of "gptq_v2" the
zero point itself. For 2, 4 and 8 bits the 1 is subtracted from and added to whole words, as in the programs that write such
files: a zero point of 0 borrows from the field above it, and reading undoes that.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lorakeet.quant.packed import TILE

BITS = (2, 3, 4, 8)
WORD = 32
ZeroFormat = Literal["gptq", "gptq_v2"]


def words_for(codes: int, bits: int) -> int | None:
    """The number of words that `codes` codes fill, or None if they do not fill whole words."""
    words, rest = divmod(codes * bits, WORD)
    return None if rest else words


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Packs codes (n, columns) of any integer dtype, each below 2^bits, to int32 words (n·bits/32, columns)."""
    count, columns = codes.shape
    words = words_for(count, bits)
    if words is None:
        raise ValueError(f"{count} codes of {bits} bits do not fill whole words of {WORD} bits")
    step = max(1, TILE // max(1, count))
    if columns <= step:
        return _pack(codes, bits, words)
    packed = torch.empty(words, columns, dtype=torch.int32, device=codes.device)
    for start in range(0, columns, step):
        packed[:, start : start + step] = _pack(codes[:, start : start + step], bits, words)
    return packed


def _pack(codes: Tensor, bits: int, words: int) -> Tensor:
    """As `pack_words`, all columns at once, which takes some 30 bytes a code."""
    count, columns = codes.shape
    wide = torch.zeros(words + 1, columns, dtype=torch.int64, device=codes.device)  # one more, for codes that cross a word
    places = torch.arange(count, device=codes.device) * bits
    shifted = codes.to(torch.int64) << (places % WORD)[:, None]
    word = places // WORD
    wide.index_add_(0, word, shifted & 0xFFFFFFFF)
    wide.index_add_(0, word + 1, shifted >> WORD)
    wide = wide[:words]
    return torch.where(wide >= 1 << 31, wide - (1 << 32), wide).to(torch.int32)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Unpacks int32 words (w, columns) to codes (w·32/bits, columns), uint8."""
    mask = (1 << bits) - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
        codes = (words[:, None] >> shifts[:, None]).bitwise_and_(mask)  # the sign that >> drags in is masked away
        return codes.to(torch.uint8).reshape(-1, words.shape[1])
    periods = words.view(-1, bits, words.shape[1])  # 32 codes each
    codes = torch.empty(len(periods), WORD, words.shape[1], dtype=torch.uint8, device=words.device)
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        code = periods[:, word] >> shift
        left = WORD - shift
        if left < bits:
            code = (code & ((1 << left) - 1)) | (periods[:, word + 1] << left)
        codes[:, place] = (code & mask).to(torch.uint8)
    return codes.view(-1, words.shape[1])


def unpack_word_rows(words: Tensor, bits: int) -> Tensor:
    """Unpacks contiguous int32 words (rows, w) whose codes run along each row to codes (rows, w·32/bits), uint8.

    A byte of two or four codes is spread over as many bytes, in place of a shift for each code.
    """
    if bits == 3:
        return unpack_words(words.t(), bits).t().contiguous()
    packed = words.view(torch.uint8)
    if bits == 8:
        return packed
    if bits == 4:
        wide = packed.to(torch.int16)
        return wide.bitwise_left_shift(4).bitwise_or_(wide).bitwise_and_(0x0F0F).view(torch.uint8)
    spread = packed.to(torch.int32)
    spread = spread.bitwise_left_shift(12).bitwise_or_(spread).bitwise_and_(0x000F000F)
    return spread.bitwise_left_shift(6).bitwise_or_(spread).bitwise_and_(0x03030303).view(torch.uint8)


def pack_zeros(zeros: Tensor, bits: int, zero_format: ZeroFormat) -> Tensor:
    """Packs zero points (groups, out) to qzeros (groups, out·bits/32), int32."""
    if zero_format == "gptq_v2":
        return pack_words(zeros.t(), bits).t().contiguous()
    if WORD % bits:
        return pack_words(((zeros.to(torch.int32) - 1) & ((1 << bits) - 1)).t(), bits).t().contiguous()
    return pack_words(zeros.t(), bits).t().contiguous() - one_less(bits)


def unpack_zeros(qzeros: Tensor, bits: int, zero_format: ZeroFormat) -> Tensor:
    """Unpacks qzeros (groups, out·bits/32) to zero points (groups, out), uint8."""
    if zero_format == "gptq_v2":
        return unpack_words(qzeros.t().contiguous(), bits).t()
    if WORD % bits:
        return ((unpack_words(qzeros.t().contiguous(), bits) + 1) & ((1 << bits) - 1)).t()
    return unpack_words((qzeros + one_less(bits)).t().contiguous(), bits).t()


def one_less(bits: int) -> int:
    """A word with a 1 in each of its fields: what "gptq" subtracts from zero points."""
    return sum(1 << place for place in range(0, WORD, bits))
