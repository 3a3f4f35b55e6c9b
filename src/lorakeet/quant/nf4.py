"""NF4, the 4-bit code of QLoRA (https://arxiv.org/abs/2305.14314), with double quantisation; the numbers are bitsandbytes'.

W is cut, row after row, into blocks of `block_size` numbers. Each block keeps its largest absolute value a and 4 bits for every
number: the nearest of 16 levels in [−1, 1], the quantiles of a normal distribution.

        W[i] = LEVELS[code[i]] · a[i / block]                 two codes to a byte, the first one in the high half

Double quantisation keeps a itself in 8 bits, less its mean, in blocks of 256 with a scale s each:

        a[j] = DYNAMIC[absmax[j]] · s[j / 256] + mean         4.127 bits a number in all, for blocks of 64

This file packs weights on the CPU, whatever the device, so that a weight becomes the same bytes on every machine. Whole weights
are dequantised to bf16 on a CPU by kernels/cpu/stored if the C library can be built. Others use bitsandbytes' kernels if that
package is installed, else this file, bit for bit the same.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu.stored import NF4, StoredWeight, address_of
from lorakeet.kernels.nf4_codes import Nf4Codes
from lorakeet.quant.packed import PackedBase, tile_size

# Section 3 and appendix E of the paper; fp32 values as published with its code.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024)
SCALE_BLOCK = 256  # absmax values that share one scale
BINS = 65536  # of bitsandbytes' table over [−1, 1], by which its CPU code finds the nearest of the 256 levels
_TINY = 1e-38  # a block of zeros divides by this
_NO_COMPILER = "TORCHDYNAMO_DISABLE"  # torch's environment variable
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Nf4Base(PackedBase):
    """W in NF4. Buffers: `packed` (⌈n/2⌉ bytes), `absmax` (a byte or an fp32 per block), `scales` and `mean` (fp32)."""

    packed: Tensor
    absmax: Tensor
    scales: Tensor | None
    mean: Tensor | None

    def __init__(
        self, shape: tuple[int, int], *, block_size: int = 64, double_quant: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(shape)
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size is {block_size}; expected one of {', '.join(map(str, BLOCK_SIZES))}")
        self.block_size = block_size
        self.double_quant = double_quant
        for name, (dtype, size) in nf4_buffer_shapes(shape, block_size=block_size, double_quant=double_quant).items():
            self.register_buffer(name, torch.zeros(size, dtype=dtype, device=device))
        if not double_quant:
            self.register_buffer("scales", None)
            self.register_buffer("mean", None)

    @classmethod
    def of(cls, weight: Tensor, *, block_size: int = 64, double_quant: bool = True) -> Nf4Base:
        """`weight` (out, in) in any floating dtype, packed on the CPU."""
        base = cls((weight.shape[0], weight.shape[1]), block_size=block_size, double_quant=double_quant)
        base.store(weight)
        return base

    @property
    def settings(self) -> dict[str, Any]:
        return {"method": "nf4", "shape": list(self.shape), "block_size": self.block_size, "double_quant": self.double_quant}

    def store(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the weight is {tuple(weight.shape)}, but this base is {self.shape}")
        flat = weight.detach().cpu().contiguous().view(-1)
        packed, absmax = nf4_codes(flat, self.block_size)
        self.packed.copy_(packed)
        if self.scales is None or self.mean is None:
            self.absmax.copy_(absmax)
            return
        mean = absmax.mean()
        codes, scales = quantise_absmax(absmax - mean)
        self.absmax.copy_(codes)
        self.scales.copy_(scales)
        self.mean.copy_(mean)

    def block_maxima(self, first: int, last: int) -> Tensor:
        """The largest absolute values of the blocks `first` to `last` − 1, fp32; `first` is a multiple of 256."""
        part = self.absmax[first:last]
        if self.scales is None or self.mean is None:
            return part
        scales = self.scales[first // SCALE_BLOCK : math.ceil(last / SCALE_BLOCK)]
        levels = _table("dynamic", part)[part.int()]
        return levels * scales.repeat_interleave(SCALE_BLOCK)[: len(part)] + self.mean

    @property
    def row_step(self) -> int:
        whole = self.block_size * SCALE_BLOCK
        return whole // math.gcd(whole, self.shape[1])

    def nf4_codes(self, first: int, rows: int) -> Nf4Codes | None:
        begin, count, size = first * self.shape[1], rows * self.shape[1], self.block_size
        nested = self.scales is not None
        if count % size or begin % (size * SCALE_BLOCK if nested else size):
            return None
        blocks = slice(begin // size, (begin + count) // size)
        scales = None if self.scales is None else self.scales[blocks.start // SCALE_BLOCK : -(-blocks.stop // SCALE_BLOCK)]
        tables = _table("levels", self.packed), _table("dynamic", self.packed)
        packed = self.packed[begin // 2 : (begin + count) // 2]
        return Nf4Codes(packed, self.absmax[blocks], scales, self.mean, *tables, size)

    def _stored_weight(self) -> StoredWeight | None:
        outer, mean = (0 if part is None else address_of(part) for part in (self.scales, self.mean))
        tables = address_of(_table("levels", self.packed)), address_of(_table("dynamic", self.packed))
        codes, scales = address_of(self.packed), address_of(self.absmax)
        return StoredWeight(NF4, *self.shape, codes, scales, outer, mean, *tables, self.block_size)

    def unpack_by_torch(self, out: Tensor, first: int) -> Tensor:
        flat, size, before = out.view(-1), self.block_size, first * self.shape[1]
        step = tile_size(self.device, size * SCALE_BLOCK)
        for start in range(0, len(flat), step):
            stop = min(start + step, len(flat))
            begin, end = before + start, before + stop
            maxima = self.block_maxima(begin // size, math.ceil(end / size))
            packed = self.packed[begin // 2 : (end + 1) // 2]
            flat[start:stop].copy_(self._values(packed, maxima, stop - start, out.dtype))
        return out

    def _values(self, packed: Tensor, maxima: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Dequantises `count` numbers; whole blocks by bitsandbytes if it is installed."""
        size = self.block_size
        whole = count - count % size
        if not whole or not has_bitsandbytes(packed.device):
            return dequantise_blocks(packed, maxima, size)[:count]
        # Always as rows of one block: with rows that end within a block, bitsandbytes 0.50's AVX-512 kernel reads the wrong
        # absmax (seen for widths that are multiples of 16 but not of 64).
        kernel = torch.ops.bitsandbytes.dequantize_4bit.default
        target = dtype if dtype in KERNEL_DTYPES else torch.float32
        blocks = whole // size
        found: Tensor = kernel(packed[: whole // 2], maxima[:blocks], size, "nf4", (blocks, size), target).view(-1)
        if whole == count:
            return found
        tail = dequantise_blocks(packed[whole // 2 :], maxima[blocks:], size)[: count - whole]
        return torch.cat([found, tail.to(target)])


def nf4_buffer_shapes(
    shape: tuple[int, int], *, block_size: int, double_quant: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each buffer of a weight (out, in)."""
    count = shape[0] * shape[1]
    blocks = math.ceil(count / block_size)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"packed": (torch.uint8, (math.ceil(count / 2),))}
    if not double_quant:
        return {**found, "absmax": (torch.float32, (blocks,))}
    scales = {"scales": (torch.float32, (math.ceil(blocks / SCALE_BLOCK),)), "mean": (torch.float32, ())}
    return {**found, "absmax": (torch.uint8, (blocks,)), **scales}


def nf4_codes(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantises numbers (n,) to 4-bit codes, two to a byte (⌈n/2⌉,), and the largest absolute value of each block, fp32."""
    levels = torch.tensor(LEVELS)
    bounds = ((levels[:-1] + levels[1:]) / 2).tolist()
    codes, maxima = [], []
    for part in torch.split(flat, tile_size(flat.device, block_size)):
        wide = part.float()
        whole = len(wide) - len(wide) % block_size
        blocks = wide[:whole].view(-1, block_size)
        largest = blocks.abs().amax(1)
        scaled = [(blocks * (1.0 / largest.clamp_min(_TINY))[:, None]).clamp_(-1, 1).view(-1)]
        maxima.append(largest)
        if whole < len(wide):  # an incomplete block: divided, while full ones are multiplied by the inverse
            rest = wide[whole:]
            most = rest.abs().amax().clamp_min(_TINY)
            scaled.append((rest / most).clamp_(-1, 1))
            maxima.append(most[None])
        numbers = torch.cat(scaled)
        found = torch.zeros(len(numbers), dtype=torch.uint8)
        for bound in bounds:  # three times as fast as torch.bucketize
            found += numbers > bound
        codes.append(pack_nibbles(found))
    return torch.cat(codes), torch.cat(maxima)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Packs codes (n,) uint8 two to a byte (⌈n/2⌉,), the first in the high half; an odd last one is followed by the code of 0."""
    padded = torch.nn.functional.pad(codes, (0, len(codes) % 2), value=LEVELS.index(0.0))
    return (padded[::2] << 4) | padded[1::2]


def quantise_absmax(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises centred block maxima (b,) to 8-bit codes (b,), with one fp32 scale for each 256 of them."""
    padded = torch.nn.functional.pad(absmax, (0, -len(absmax) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    scales = padded.abs().amax(1)
    scaled = (padded * (1.0 / scales.clamp_min(_TINY))[:, None]).clamp_(-1, 1)
    bins = ((scaled + 1.0) * 0.5 * (BINS - 1) + 0.5).int()
    codes = _table("bins", absmax)[bins]
    codes[scales == 0] = 0
    return codes.view(-1)[: len(absmax)], scales


def dequantise_blocks(packed: Tensor, maxima: Tensor, block_size: int) -> Tensor:
    """Dequantises packed codes (b,) with the maxima of their blocks to (2·b,) in fp32, as bitsandbytes does."""
    numbers = torch.nn.functional.embedding(packed.int(), _table("pairs", packed)).view(-1)
    whole = len(numbers) - len(numbers) % block_size
    numbers[:whole].view(-1, block_size).mul_(maxima[: whole // block_size, None])
    if whole < len(numbers):
        numbers[whole:].mul_(maxima[-1])
    return numbers


def dynamic_levels() -> Tensor:
    """The 256 levels of 8-bit dynamic quantisation (https://arxiv.org/abs/1511.04561) in rising order, fp32.

    They are 0, 1, and for each power of ten from 1e-6 to 1 the midpoints of 2^i equal parts of [0.1, 1], with both signs.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        levels += [*middles, *(-middle for middle in middles)]
    return torch.tensor(sorted(levels), dtype=torch.float32)


def nearest_levels(shares: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of the levels that are nearest to numbers from −1 to 1, of their shape, and these levels, fp32."""
    codes = torch.bucketize(shares, _table("middles", shares))
    return codes, _table("levels", shares)[codes]


def _middles() -> Tensor:
    """What lies halfway between neighbouring levels (15,)."""
    levels = torch.tensor(LEVELS)
    return (levels[:-1] + levels[1:]) / 2


def _pairs() -> Tensor:
    """The two levels of each byte (256, 2)."""
    levels, byte = torch.tensor(LEVELS), torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)


def _bins() -> Tensor:
    """The code of the level nearest to each bin's value (65536,)."""
    levels = dynamic_levels()
    at = -1.0 + (2.0 * torch.arange(BINS, dtype=torch.float32)) / (BINS - 1)
    return torch.bucketize(at, 0.5 * (levels[:-1] + levels[1:])).to(torch.uint8)


_TABLES: dict[str, tuple[Callable[[], Tensor], tuple[int, ...], torch.dtype]] = {
    "levels": (lambda: torch.tensor(LEVELS), (16,), torch.float32),
    "middles": (_middles, (15,), torch.float32),
    "pairs": (_pairs, (256, 2), torch.float32),
    "dynamic": (dynamic_levels, (256,), torch.float32),
    "bins": (_bins, (BINS,), torch.uint8),
}
_CACHED: dict[tuple[str, torch.device], Tensor] = {}


def _table(name: str, like: Tensor) -> Tensor:
    """A table of _TABLES on the device of `like`, cached; for a fake tensor (of a traced step) a fake one."""
    make, shape, dtype = _TABLES[name]
    if hasattr(like, "fake_mode"):  # of a step on shapes
        return torch.empty(shape, dtype=dtype, device=like.device)
    table = _CACHED.get((name, like.device))
    if table is None:
        table = _CACHED[name, like.device] = make().to(like.device)
    return table


def has_bitsandbytes(device: torch.device) -> bool:
    """True if bitsandbytes dequantises on `device`. The first call imports it, which takes a few seconds."""
    return device.type in ("cpu", "cuda") and _bitsandbytes()


def bitsandbytes_advice() -> str:
    """Advice for the user if bitsandbytes is missing; empty if it is installed."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return ""
    return (
        "bitsandbytes is not installed: NF4 weights are unpacked by Lorakeet's own code, to the same numbers but more slowly. "
        "For its kernels: pip install 'lorakeet[nf4]'"
    )


@functools.cache
def _bitsandbytes() -> bool:
    """Imports the package if it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    with quiet_bitsandbytes():
        import bitsandbytes  # noqa: F401
    return True


@contextlib.contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Context manager for importing bitsandbytes: no log line about a hub kernel, and torch's compiler is not loaded.

    The compiler, which wraps a function that is not used here, would take 43 MiB.
    """
    _QUIET.enter()
    try:
        yield
    finally:
        _QUIET.leave()


class _Quiet:
    """Settings shared by all threads within the context: the first sets them, the last restores them."""

    def __init__(self) -> None:
        self._lock, self._within = threading.Lock(), 0
        self._log = logging.getLogger("bitsandbytes.backends.cpu.ops")
        self._level, self._before = self._log.level, os.environ.get(_NO_COMPILER)

    def enter(self) -> None:
        with self._lock:
            if self._within == 0:
                self._level, self._before = self._log.level, os.environ.get(_NO_COMPILER)
                self._log.setLevel(logging.ERROR)
                os.environ[_NO_COMPILER] = "1"
            self._within += 1

    def leave(self) -> None:
        with self._lock:
            self._within -= 1
            if self._within:
                return
            self._log.setLevel(self._level)
            os.environ.pop(_NO_COMPILER, None)
            if self._before is not None:
                os.environ[_NO_COMPILER] = self._before


_QUIET = _Quiet()
