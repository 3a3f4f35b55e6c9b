"""The grid of a packed weight: the values that its codes can take under fixed scales, and rounding to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lorakeet.quant import gguf_codes
from lorakeet.quant.gguf import GgufBase
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.nf4 import Nf4Base, nearest_levels, pack_nibbles
from lorakeet.quant.packed import PackedBase


class FixedGrid(Protocol):
    """Rounds to the values that codes can take under fixed scales."""

    def column(self, numbers: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """The nearest codes of column `at` for `numbers` (out,), and their values, fp32."""
        ...

    def values(self, weight: Tensor) -> Tensor:
        """The nearest values to `weight` (out, in), fp32."""
        ...

    def nearest(self, weight: Tensor) -> PackedBase:
        """`weight` (out, in) packed with its nearest values."""
        ...

    @property
    def filled(self) -> Callable[[Tensor], PackedBase]:
        """Returns the packed weight with given codes (out, in) uint8."""
        ...


@dataclass(frozen=True)
class UniformGrid:
    """x = step·code − offset: GPTQ and GGUF."""

    step: Tensor  # (groups, out) fp32
    inverse: Tensor  # (groups, out) 1/step
    offset: Tensor  # (groups, out) fp32
    group_of: list[int]  # of each column
    highest: int
    filled: Callable[[Tensor], PackedBase]

    def column(self, numbers: Tensor, at: int) -> tuple[Tensor, Tensor]:
        group = self.group_of[at]
        offset = self.offset[group]
        codes = gguf_codes.nearest_codes(numbers, self.inverse[group], offset, self.highest)
        return codes, torch.mul(self.step[group], codes).sub_(offset)

    def values(self, weight: Tensor) -> Tensor:
        return self._codes(weight).mul_(self.step[self.group_of].t()).sub_(self.offset[self.group_of].t())

    def nearest(self, weight: Tensor) -> PackedBase:
        return self.filled(self._codes(weight).to(torch.uint8))

    def _codes(self, weight: Tensor) -> Tensor:
        inverse, offset = self.inverse[self.group_of].t(), self.offset[self.group_of].t()
        return gguf_codes.nearest_codes(weight, inverse, offset, self.highest)


@dataclass(frozen=True)
class Nf4Grid:
    """x = LEVELS[code]·a, with a the largest absolute value of the number's block: NF4."""

    largest: Tensor  # (out, in) fp32
    some_zero: bool  # a block of zeros has 0 for its largest
    filled: Callable[[Tensor], PackedBase]

    def column(self, numbers: Tensor, at: int) -> tuple[Tensor, Tensor]:
        return self._nearest(numbers, self.largest[:, at])

    def values(self, weight: Tensor) -> Tensor:
        return self._nearest(weight, self.largest)[1]

    def nearest(self, weight: Tensor) -> PackedBase:
        return self.filled(self._nearest(weight, self.largest)[0].to(torch.uint8))

    def _nearest(self, numbers: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        safe = torch.where(largest == 0, torch.ones_like(largest), largest) if self.some_zero else largest
        codes, levels = nearest_levels(numbers / safe)
        return codes, levels.mul_(largest)


def grid_of(base: PackedBase) -> FixedGrid:
    """The grid under the scales of `base`. ValueError unless it is GPTQ, NF4 or GGUF."""
    if isinstance(base, GptqBase):
        return _gptq(base)
    if isinstance(base, GgufBase):
        step, offset = (part.t().contiguous() for part in gguf_codes.steps(base))
        group_of = [column // (base.shape[1] // len(step)) for column in range(base.shape[1])]
        highest, filled = gguf_codes.HIGHEST[base.kind], partial(gguf_codes.with_codes, base)
        return UniformGrid(step, gguf_codes.inverted(step), offset, group_of, highest, filled)
    if isinstance(base, Nf4Base):
        return _nf4(base)
    raise ValueError(f"{type(base).__name__} has no grid here; expected GptqBase, Nf4Base or GgufBase")


def requantise_like(like: PackedBase, weight: Tensor) -> PackedBase:
    """`weight` (out, in) rounded to the nearest in the layout of `like` (bits, groups, blocks), with scales fitted to it."""
    if isinstance(like, GgufBase):
        return gguf_codes.fit_gguf_scales(weight, like.kind)
    if isinstance(like, Nf4Base):
        return Nf4Base.of(weight, block_size=like.block_size, double_quant=like.double_quant)
    if isinstance(like, GptqBase):
        found = GptqBase.like(like)
        found.g_idx.copy_(like.g_idx)
        found.store(weight)
        return found
    raise ValueError(f"{type(like).__name__} has no grid here; expected GptqBase, Nf4Base or GgufBase")


def _gptq(base: GptqBase) -> UniformGrid:
    grid = base.grid
    step = grid.scales.float()

    def filled(codes: Tensor) -> PackedBase:
        found = GptqBase.like(base)
        found.fill(codes, grid)
        return found

    offset = step * grid.zeros.float()
    return UniformGrid(step, gguf_codes.inverted(step), offset, grid.g_idx.tolist(), 2**base.bits - 1, filled)


def _nf4(base: Nf4Base) -> Nf4Grid:
    count = base.shape[0] * base.shape[1]
    maxima = base.block_maxima(0, len(base.absmax))
    largest = maxima.repeat_interleave(base.block_size)[:count].view(base.shape)

    def filled(codes: Tensor) -> PackedBase:
        found = Nf4Base(base.shape, block_size=base.block_size, double_quant=base.double_quant, device=base.device)
        found.load_state_dict(base.state_dict())
        found.packed.copy_(pack_nibbles(codes.view(-1)))
        return found

    return Nf4Grid(largest, not bool(maxima.all()), filled)
