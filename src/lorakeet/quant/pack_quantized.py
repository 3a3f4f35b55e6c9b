"""Whole numbers of 2, 4 or 8 bits in 32-bit words, with a scale for each group of columns: pack-quantized of compressed-tensors.

    weight_packed        int32 (out, ⌈in·bits/32⌉)       codes along each row, lowest bit first; the last word may not be full
    weight_scale         float (out, groups)             (1,) for one scale in all
    weight_zero_point    int32 (⌈out·bits/32⌉, groups)   codes down each column; or int8 (out, groups); absent if symmetric
    weight_g_idx         int32 (in,)                     the group of each column, where they are not in order (actorder: group)
    weight_shape         int64 (2,)                      out, in

    W[r, c] = scale[r, g] · (code[r, c] − zero[r, g]),   zero = 2^(bits−1) if symmetric

compressed-tensors stores value + 2^(bits−1) of values and zero points alike, and dequantises (value − zero_point) · scale
(https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized and quantization/lifecycle/forward.py,
`dequantize`). It rounds that product to the dtype of the scale; here it is exact in fp32. Versions 0.9.4, with g_idx, and 0.20.1
were compared with this bit for bit, once rounded so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.gptq_words import WORD
from lorakeet.quant.gptq import groups_in_order, pack_words, quantise_to_nearest, unpack_word_rows, unpack_words
from lorakeet.quant.packed import PackedBase, tile_size

BITS = (2, 4, 8)
MARK = "_packed"  # after the name of the weight
PARTS = (MARK, "_scale", "_shape", "_zero_point", "_g_idx")
OPTIONAL = ("_zero_point", "_g_idx")


class PackQuantizedBase(PackedBase):
    """W (out, in) in words. Buffers: `packed` int32 (out, words), `scale` fp32 and `zeros` uint8 (out, groups), `g_idx` (in,)."""

    packed: Tensor
    scale: Tensor
    zeros: Tensor
    g_idx: Tensor

    def __init__(
        self, shape: tuple[int, int], *, bits: int, groups: int, size: int, device: torch.device | str = "cpu"
    ) -> None:
        """`size`: each group is so many columns, in order; 0 where g_idx says. ValueError for bits that do not divide a word."""
        super().__init__(shape)
        if bits not in BITS:
            raise ValueError(f"bits is {bits}; expected one of {', '.join(map(str, BITS))}")
        self.bits, self.groups, self.size = bits, groups, size
        self.register_buffer("packed", torch.zeros(shape[0], packed_words(shape[1], bits), dtype=torch.int32, device=device))
        self.register_buffer("scale", torch.zeros(shape[0], groups, dtype=torch.float32, device=device))
        self.register_buffer("zeros", torch.zeros(shape[0], groups, dtype=torch.uint8, device=device))
        self.register_buffer("g_idx", groups_in_order(shape[1], size or -(-shape[1] // groups), device))

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "method": "pack-quantized", "shape": list(self.shape), "bits": self.bits, "groups": self.groups,
            "size": self.size,
        }  # fmt: skip

    def unpack_by_torch(self, out: Tensor, first: int) -> Tensor:
        columns = self.shape[1]
        step = max(1, tile_size(self.device, columns) // columns)
        for start in range(0, len(out), step):
            part = out[start : start + step]
            own = slice(first + start, first + start + len(part))
            values = unpack_word_rows(self.packed[own].contiguous(), self.bits)[:, :columns].float()
            scales, zeros = self._of_columns(self.scale[own]), self._of_columns(self.zeros[own].float())
            part.copy_(values.sub_(zeros).mul_(scales))
        return out

    def _of_columns(self, of_groups: Tensor) -> Tensor:
        """(rows, groups) to (rows, in), or what broadcasts to it."""
        if self.groups == 1:
            return of_groups
        columns = self.shape[1]
        if self.size:
            return of_groups.repeat_interleave(self.size, dim=1)[:, :columns]
        return of_groups.index_select(1, self.g_idx)

    def store(self, weight: Tensor) -> None:
        """Rounds `weight` (out, in) to the nearest values, with symmetric scales fitted in the present groups."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the weight is {tuple(weight.shape)}, but this base is {self.shape}")
        codes, grid = quantise_to_nearest(weight.detach().to(self.device), self.bits, True, self.g_idx, self.groups)
        filled = torch.nn.functional.pad(codes, (0, self.packed.shape[1] * (WORD // self.bits) - self.shape[1]))
        self.packed.copy_(pack_words(filled.t(), self.bits).t())
        self.scale.copy_(grid.scales.t())
        self.zeros.copy_(grid.zeros.t())


def packed_words(columns: int, bits: int) -> int:
    """The 32-bit words of a row of so many numbers."""
    return math.ceil(columns * bits / WORD)


def bits_of(columns: int, words: int, named: tuple[int, ...] = ()) -> int | None:
    """The bits of a number, of which so many words hold `columns`: of those that settings name, or of BITS; None if none fits."""
    return next((bits for bits in (*named, *BITS) if bits in BITS and packed_words(columns, bits) == words), None)


def group_size_of(columns: int, groups: int, sizes: tuple[int, ...]) -> int | None:
    """The columns of a group: one of the `sizes` that settings name, or what divides the columns; None if nothing fits."""
    found = next((size for size in sizes if size > 0 and -(-columns // size) == groups), None)
    return found or (None if columns % groups else columns // groups)


def base_from_words(parts: Mapping[str, Tensor], sizes: tuple[int, ...], named: tuple[int, ...] = ()) -> PackQuantizedBase:
    """The base of the tensors of a weight, by the suffixes of PARTS; `sizes` and `named` are the settings' group sizes and bits.

    ValueError says what does not fit.
    """
    if parts["_shape"].numel() != 2:
        raise ValueError(f"weight_shape has {parts['_shape'].numel()} numbers; expected out and in")
    rows, columns = (int(size) for size in parts["_shape"].flatten().tolist())
    packed, scale = parts[MARK], parts["_scale"].float()
    if packed.dtype != torch.int32:
        raise ValueError(f"weight_packed is {packed.dtype}; expected torch.int32")
    bits = bits_of(columns, packed.shape[1], named) if packed.dim() == 2 and len(packed) == rows else None
    if bits is None:
        raise ValueError(f"weight_packed is {tuple(packed.shape)} for a weight of {rows}×{columns}")
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(rows, 1)
    elif len(scale) == rows:
        scale = scale.reshape(rows, -1)
    groups = scale.shape[-1]
    size = group_size_of(columns, groups, sizes)
    if scale.shape != (rows, groups) or size is None:
        raise ValueError(f"weight_scale is {tuple(parts['_scale'].shape)} for a weight of {rows}×{columns}")
    given = parts.get("_g_idx")
    in_order = given is None or bool((given < 0).any())  # −1: never filled, as compressed-tensors takes it
    if given is not None and not in_order and not (given.shape == (columns,) and int(given.max()) < groups):
        raise ValueError(f"weight_g_idx does not name a group of {groups} for each of {columns} columns")
    base = PackQuantizedBase((rows, columns), bits=bits, groups=groups, size=size if in_order else 0)
    base.packed.copy_(packed)
    base.scale.copy_(scale)
    base.zeros.copy_(_zeros_of(parts.get("_zero_point"), (rows, groups), bits))
    if given is not None and not in_order:
        base.g_idx.copy_(given)
    return base


def _zeros_of(stored: Tensor | None, shape: tuple[int, int], bits: int) -> Tensor:
    """Zero points as codes, uint8 (out, groups)."""
    middle, (rows, groups) = 1 << (bits - 1), shape
    if stored is None:
        return torch.full(shape, middle, dtype=torch.uint8)
    if stored.dtype == torch.int32 and stored.shape == (packed_words(rows, bits), groups):
        return unpack_words(stored, bits)[:rows]
    if stored.numel() in (1, rows * groups):
        return (stored.to(torch.int32) + middle).to(torch.uint8).reshape(-1, 1 if stored.numel() == 1 else groups).expand(shape)
    raise ValueError(f"weight_zero_point is {stored.dtype} {tuple(stored.shape)} for {rows} rows in {groups} groups")
