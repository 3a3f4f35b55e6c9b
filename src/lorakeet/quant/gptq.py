"""GPTQ weights (https://arxiv.org/abs/2210.17323) as a frozen base, in the tensors of published checkpoints.

    qweight   int32 (in·bits/32, out)        codes down each column
    qzeros    int32 (groups, out·bits/32)    zero points along each row
    scales    fp16  (groups, out)
    g_idx     int32 (in,)                    the group of each input column; with desc_act in any order

    W[r, c] = scales[g, r] · (code[c, r] − zero[g, r]),  g = g_idx[c], code from 0 to 2^bits − 1

Codes lie in 32-bit words, a stream of `bits` bits a code, lowest bit first:

    bit of the stream     0 … bits−1 │ bits … 2·bits−1 │ …            word w holds the bits 32·w … 32·w + 31
    code                  0          │ 1               │ …            32 codes fill `bits` words, also of 3 bits

qzeros holds the zero points in the same way. Checkpoints of format "gptq" store zero − 1, those of "gptq_v2" the zero point
itself. For 2, 4 and 8 bits the 1 is subtracted from and added to whole words, as in the programs that write such files: a zero
point of 0 borrows from the field above it, and reading undoes that. Codes are chosen for the scales as rounded to fp16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorakeet.core.scratch import SCRATCH
from lorakeet.kernels.choose import dequantised_by_columns
from lorakeet.kernels.cpu.stored import GPTQ, StoredWeight, address_of
from lorakeet.kernels.device import is_cpu
from lorakeet.kernels.gptq_words import WORD, GptqWords
from lorakeet.quant.packed import TILE, PackedBase, tile_size

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

    def gptq_words(self) -> GptqWords | None:
        """W as other projects' kernels read it; None where zero points of three bits would have to be written anew."""
        less = one_less(self.bits) if self.zero_format == "gptq" else 0
        words = GptqWords(self.qweight, self.qzeros, self.scales, self.g_idx, self.bits, less)
        return None if less and WORD % self.bits else words

    def _rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        rows, columns = self.shape
        if part.stop - part.start == rows and dequantised_by_columns(self, dtype, self.device):
            return self.unpack(SCRATCH.matrix((columns, rows), dtype, self.device).t())
        return super()._rows(part, dtype)

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

    def unpack_by_torch(self, out: Tensor, first: int) -> Tensor:
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


_SMALLEST = 2.0**-24  # the smallest scale that fp16 holds


@dataclass(frozen=True)
class GptqGrid:
    """Scales and zero points of a weight (out, in), and the group of each column."""

    scales: Tensor  # (groups, out) fp16
    zeros: Tensor  # (groups, out) uint8
    g_idx: Tensor  # (in,) int32


def groups_in_order(columns: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """g_idx (columns,) for groups of `group_size` neighbouring columns; −1 is one group."""
    size = columns if group_size == -1 else group_size
    return (torch.arange(columns, device=device) // size).to(torch.int32)


def fit_group(weight: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """Scale (out,) fp16 and zero point (out,) uint8 that cover one group, weight (out, columns) fp32.

    The range includes 0. Symmetric: the zero point is 2^(bits−1), the range ± the largest absolute value. A group of zeros gets
    the scale 1.
    """
    highest = 2**bits - 1
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    spread = high - low
    scale = torch.where(spread > 0, (spread / highest).clamp(min=_SMALLEST), 1.0).half()
    if sym:
        return scale, torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    zero = (-low / scale.float()).round().clamp(0, highest)
    return scale, zero.to(torch.uint8)


def codes_for(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, whole numbers in fp32 of the shape of `weight`; scale and zero are fp32 and broadcast to it."""
    return (weight / scale).round_().add_(zero).clamp_(0, 2**bits - 1)


def quantise_to_nearest(weight: Tensor, bits: int, sym: bool, g_idx: Tensor, groups: int) -> tuple[Tensor, GptqGrid]:
    """Round-to-nearest: codes (out, in) uint8 and the grid, fitted group by group, of weight (out, in)."""
    rows, columns = weight.shape
    scales = torch.ones(groups, rows, dtype=torch.float16, device=weight.device)
    zeros = torch.zeros(groups, rows, dtype=torch.uint8, device=weight.device)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    for group in range(groups):
        members = (g_idx == group).nonzero().squeeze(1)
        if len(members):
            part = weight[:, members].float()
            scales[group], zeros[group] = fit_group(part, bits, sym)
            scale, zero = scales[group].float()[:, None], zeros[group].float()[:, None]
            codes[:, members] = codes_for(part, scale, zero, bits).to(torch.uint8)
    return codes, GptqGrid(scales, zeros, g_idx)


BITS = (2, 3, 4, 8)
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
