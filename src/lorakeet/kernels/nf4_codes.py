"""An NF4 weight in whole blocks, as kernels of other projects read it, and its formula."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Nf4Codes(NamedTuple):
    """Blocks of `block` numbers each, from any row of a weight on. With double quantisation `absmax` are codes."""

    packed: Tensor  # two numbers a byte, the first in the high half
    absmax: Tensor  # (blocks,): fp32, or codes in uint8
    scales: Tensor | None  # fp32, one for each 256 codes
    mean: Tensor | None  # fp32, a scalar
    levels: Tensor  # (16,), fp32
    dynamic: Tensor  # (256,), fp32: the numbers of the codes
    block: int

    def by_formula(self) -> Tensor:
        """The numbers (blocks, block) in fp32: level times the block's largest absolute value."""
        maxima = self.absmax
        if self.scales is not None and self.mean is not None:
            of_codes = self.dynamic[self.absmax.int()]
            maxima = of_codes * self.scales.repeat_interleave(256)[: len(of_codes)] + self.mean
        codes = torch.stack([self.packed >> 4, self.packed & 15], 1).view(len(maxima), self.block)
        return self.levels[codes.int()] * maxima[:, None]
