"""A packed weight of GPTQ made of random words."""

from __future__ import annotations

from typing import Literal

import torch

from lorakeet.quant.gptq import GptqBase


def base(bits: int, zero_format: Literal["gptq", "gptq_v2"] = "gptq", shape: tuple[int, int] = (96, 128)) -> GptqBase:
    """Random words, whose zero points also wrap, and columns of four groups in no order."""
    draw = torch.Generator().manual_seed(bits)
    found = GptqBase(shape, bits=bits, groups=4, sym=False, zero_format=zero_format)
    for words in (found.qweight, found.qzeros):
        words.copy_(torch.randint(-(1 << 31), 1 << 31, words.shape, generator=draw).to(torch.int32))
    found.scales.copy_(torch.rand(found.scales.shape, generator=draw) + 0.5)
    found.g_idx.copy_(torch.randint(4, found.g_idx.shape, generator=draw))
    return found
