"""A whole GPTQ weight as kernels of other projects read it, and its formula."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORD = 32  # bits, in which codes and zero points are stored


class GptqWords(NamedTuple):
    """W (out, in) in the tensors of published checkpoints (quant/gptq): codes down each column, zero points along each row."""

    qweight: Tensor  # int32 (in·bits/32, out)
    qzeros: Tensor  # int32 (groups, out·bits/32)
    scales: Tensor  # fp16 (groups, out)
    g_idx: Tensor  # int32 (in,)
    bits: int
    less: int = 0  # what a word of qzeros lacks: "gptq" stores zero points less 1

    def zeros(self) -> Tensor:
        """The words (groups, out·bits/32) of the zero points themselves."""
        return self.qzeros + self.less if self.less else self.qzeros

    def by_formula(self) -> Tensor:
        """W transposed (in, out) in fp32: scale · (code − zero)."""
        codes = _fields(self.qweight.t(), self.bits).t()
        zeros = _fields(self.zeros(), self.bits)
        groups = self.g_idx.long()
        return (codes - zeros[groups]).float() * self.scales.float()[groups]


def _fields(words: Tensor, bits: int) -> Tensor:
    """The codes (rows, w·32/bits) of streams of `bits` bits that run along the rows of words (rows, w), lowest bit first.

    One bit of all codes after the other, which takes a few numbers a code, not one for each bit.
    """
    fields = words.new_zeros(len(words), words.shape[1] * WORD // bits)
    for bit in range(bits):
        places = torch.arange(bit, words.shape[1] * WORD, bits, device=words.device)
        of_codes = words.index_select(1, places // WORD)
        of_codes.bitwise_right_shift_((places % WORD).to(words.dtype)).bitwise_and_(1)
        fields.bitwise_or_(of_codes.bitwise_left_shift_(bit))
    return fields
