"""GPTQ weights (https://arxiv.org/abs/2210.17323) as a frozen base, in the tensors of published checkpoints.

    qweight   int32 (in·bits/32, out)        codes down each column               quant/gptq_pack
    qzeros    int32 (groups, out·bits/32)    zero points along each row
    scales    fp16  (groups, out)
    g_idx     int32 (in,)                    the group of each input column; with desc_act in any order

    W[r, c] = scales[g, r] · (code[c, r] − zero[g, r]),  g = g_idx[c]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lorakeet.core import triton_products
from lorakeet.kernels.cpu.stored import GPTQ, StoredWeight, address_of
from lorakeet.kernels.device import is_cpu
from lorakeet.kernels.tiled_weight import TiledWeight
from lorakeet.quant.gptq_grid import GptqGrid, groups_in_order, quantise_to_nearest
from lorakeet.quant.gptq_pack import (
    BITS,
    WORD,
    ZeroFormat,
    one_less,
    pack_words,
    pack_zeros,
    unpack_word_rows,
    unpack_zeros,
    words_for,
)
from lorakeet.quant.packed import PackedBase, tile_size

PARTS = ("qweight", "qzeros", "scales", "g_idx")
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class GptqBase(PackedBase):
    """W (out, in) in GPTQ's four tensors, as they lie in the file."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        bits: int,
        groups: int,
        sym: bool = True,
        zero_format: ZeroFormat = "gptq",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(shape)
        self.bits, self.groups, self.sym, self.zero_format = bits, groups, sym, zero_format
        self._checked, self._valid = (0, 0), False  # the g_idx that was checked last, and the result
        for name, (dtype, size) in gptq_buffer_shapes(shape, bits=bits, groups=groups).items():
            self.register_buffer(name, torch.zeros(size, dtype=dtype, device=device))
        self.g_idx.copy_(groups_in_order(shape[1], math.ceil(shape[1] / groups)))

    @classmethod
    def of(cls, codes: Tensor, grid: GptqGrid, *, bits: int, sym: bool, zero_format: ZeroFormat = "gptq") -> GptqBase:
        """The base with these codes (out, in) and this grid; `sym` is for fitting another weight (`store`)."""
        shape = (codes.shape[0], codes.shape[1])
        groups = grid.scales.shape[0]
        base = cls(shape, bits=bits, groups=groups, sym=sym, zero_format=zero_format, device=codes.device)
        base.fill(codes, grid)
        return base

    @classmethod
    def like(cls, other: GptqBase) -> GptqBase:
        """A base with the settings of `other` and zero codes."""
        settings = other.settings
        del settings["method"], settings["shape"]
        return cls(other.shape, **settings, device=other.device)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "method": "gptq",
            "shape": list(self.shape),
            "bits": self.bits,
            "groups": self.groups,
            "sym": self.sym,
            "zero_format": self.zero_format,
        }

    @property
    def grid(self) -> GptqGrid:
        """Scales, zero points and groups, to quantise another weight with them (quant/gptq_solve)."""
        return GptqGrid(self.scales, unpack_zeros(self.qzeros, self.bits, self.zero_format), self.g_idx)

    def fill(self, codes: Tensor, grid: GptqGrid) -> None:
        """Writes codes (out, in) and a grid into the buffers."""
        self.qweight.copy_(pack_words(codes.t(), self.bits))
        self.qzeros.copy_(pack_zeros(grid.zeros, self.bits, self.zero_format))
        self.scales.copy_(grid.scales)
        self.g_idx.copy_(grid.g_idx)

    def store(self, weight: Tensor) -> None:
        """Rounds `weight` (out, in) to the nearest values, with scales and zero points fitted in the present groups.

        quant/gptq_solve is better, and needs the layer's inputs.
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the weight is {tuple(weight.shape)}, but this base is {self.shape}")
        self.fill(*quantise_to_nearest(weight.detach().to(self.device), self.bits, self.sym, self.g_idx, self.groups))

    @property
    def row_step(self) -> int:
        return WORD  # the zero points of so many rows fill whole words

    def in_tiles(self) -> TiledWeight:
        from lorakeet.kernels.triton.gptq import gptq_tiles

        buffers = (self.qweight, self.qzeros, self.scales, self.g_idx)
        return gptq_tiles(buffers, self.shape, self.bits, self.zero_format == "gptq")

    def _stored_weight(self) -> StoredWeight | None:
        if self.bits != 4 or not self._groups_exist():
            return None
        added = one_less(self.bits) if self.zero_format == "gptq" else 0
        zeros, groups = address_of(self.qzeros), address_of(self.g_idx)
        scales, count = address_of(self.scales), self.groups
        codes = address_of(self.qweight)
        return StoredWeight(GPTQ, *self.shape, codes, scales, outer=zeros, more=groups, size=added, groups=count)

    def _groups_exist(self) -> bool:
        """True if every column's group exists; checked once for each content of g_idx."""
        g_idx = self.g_idx
        if not address_of(g_idx):
            return True
        content = g_idx.data_ptr(), -1 if g_idx.is_inference() else g_idx._version
        if self._checked != content:
            self._checked, self._valid = content, bool(((g_idx >= 0) & (g_idx < self.groups)).all())
        return self._valid

    def unpack(self, out: Tensor, first: int = 0) -> Tensor:
        if triton_products.dequantises(self, out, self._packed_buffers()):
            return triton_products.dequantise_rows(self.in_tiles(), out, first)
        rows, columns = out.shape
        size = columns // self.groups if self._in_order() else 1  # columns next to each other that share scale and zero point
        step = tile_size(self.device, columns * WORD) // columns
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            begin, end = first + start, first + stop
            words = self.qweight[:, begin:end].t().contiguous()
            values = unpack_word_rows(words, self.bits).float().view(stop - start, -1, size)
            qzeros = self.qzeros[:, begin * self.bits // WORD : end * self.bits // WORD]
            zeros, scales = unpack_zeros(qzeros, self.bits, self.zero_format).t(), self.scales[:, begin:end].t().float()
            if size == 1:
                zeros, scales = zeros[:, self.g_idx], scales[:, self.g_idx]
            out[start:stop].copy_(values.sub_(zeros[..., None]).mul_(scales[..., None]).view(stop - start, columns))
        return out

    def _in_order(self) -> bool:
        """True if the groups are of one size and of neighbouring columns, as without desc_act.

        Always False on a GPU, where the check would synchronise.
        """
        columns = self.shape[1]
        if columns % self.groups or not is_cpu(self.device):
            return False
        return torch.equal(self.g_idx, groups_in_order(columns, columns // self.groups))


def gptq_buffer_shapes(shape: tuple[int, int], *, bits: int, groups: int) -> Shapes:
    """Dtype and shape of each tensor of a weight (out, in); ValueError if `bits` or a size does not fit the format."""
    rows, columns = shape
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; expected one of {', '.join(map(str, BITS))}")
    down, along = words_for(columns, bits), words_for(rows, bits)
    if down is None or along is None:
        raise ValueError(f"a weight of {rows}×{columns} does not fill whole words with {bits} bits a number")
    return {
        "qweight": (torch.int32, (down, rows)),
        "qzeros": (torch.int32, (groups, along)),
        "scales": (torch.float16, (groups, rows)),
        "g_idx": (torch.int32, (columns,)),
    }
