"""Weights in ggml's block types Q4_0 … Q6_K: rows of blocks, each a few bytes of scales and codes.

The layouts are those of ggml (block_q4_0 … block_q6_K in its ggml-common.h). A block of 32 or 256 numbers x with codes q:

    Q4_0, Q5_0, Q8_0      x = d·(q − z), z the middle of the codes (8, 16, 0)
    Q4_1, Q5_1            x = d·q + m
    Q4_K, Q5_K            x = (d·s)·q − (e·m), s and m 6-bit numbers for each 32
    Q6_K                  x = (d·s)·(q − 32), s an int8 for each 16

Products and sums are taken in fp32 in this order, as in ggml's reference, so that the numbers are equal to the bit. Whole weights
are dequantised to bf16 by kernels/cpu/c/gguf.c.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import EnvironmentProblem, PackageMissing
from lorakeet.kernels.cpu.stored import GGUF, StoredWeight, address_of
from lorakeet.quant.packed import PackedBase, tile_size


@dataclass(frozen=True)
class BlockType:
    """A ggml type: `size` numbers in `bytes` bytes; `decode` turns blocks (n, bytes) into fp32 (n, size)."""

    size: int
    bytes: int
    decode: Callable[[Tensor], Tensor]


def fp16_at(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at byte `start` of each block, (n, 1) in fp32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """Unpacks bytes (n, 16) to codes (n, 32): the low halves first."""
    return torch.cat([codes & 15, codes >> 4], dim=1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """Unpacks four bytes of each block to the fifth bits of its codes: (n, 32), each 0 or 16."""
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.view(len(packed), 32) << 4


def _q5(blocks: Tensor, at: int) -> Tensor:
    """The codes (n, 32) of Q5_0 and Q5_1, whose fifth bits are at byte `at`."""
    return (_nibbles(blocks[:, at + 4 :]) | _fifth_bits(blocks[:, at : at + 4])).float()


def scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpacks the twelve bytes of a K-block to eight scales and eight minima, (n, 8, 1) each in fp32.

    The first four of each are the low six bits of bytes 0-3 and 4-7; the others have their low halves in bytes 8-11 and their
    upper two bits on top of the first ones.
    """
    first, second, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], dim=1)
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], dim=1)
    return scales.float()[:, :, None], minima.float()[:, :, None]


def _k_blocks(blocks: Tensor, codes: Tensor) -> Tensor:
    """Dequantises codes (n, 8, 32) of Q4_K or Q5_K to (n, 256)."""
    scales, minima = scales_and_minima(blocks[:, 4:16])
    d, e = fp16_at(blocks, 0)[:, :, None], fp16_at(blocks, 2)[:, :, None]
    return torch.sub((d * scales) * codes.float(), e * minima).flatten(1)


def _k_nibbles(packed: Tensor) -> Tensor:
    """Unpacks 128 bytes of each block to codes (n, 8, 32): 32 low halves, then the 32 high halves of the same bytes."""
    groups = packed.reshape(len(packed), 4, 1, 32)
    return torch.cat([groups & 15, groups >> 4], dim=2).view(len(packed), 8, 32)


def _q5_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[:, None, 16:48] >> shifts) & 1
    return _k_blocks(blocks, _k_nibbles(blocks[:, 48:]) | (fifth << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    n = len(blocks)
    low = blocks[:, :128].reshape(n, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], dim=2).view(n, 8, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = ((blocks[:, 128:192].reshape(n, 2, 1, 32) >> shifts) & 3).view(n, 8, 32)
    codes = (low | (high << 4)).view(n, 16, 16).float() - 32
    scales = fp16_at(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scales[:, :, None] * codes).flatten(1)


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, lambda blocks: fp16_at(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)),
    "Q4_1": BlockType(32, 20, lambda blocks: fp16_at(blocks, 0) * _nibbles(blocks[:, 4:]).float() + fp16_at(blocks, 2)),
    "Q5_0": BlockType(32, 22, lambda blocks: fp16_at(blocks, 0) * (_q5(blocks, 2) - 16)),
    "Q5_1": BlockType(32, 24, lambda blocks: fp16_at(blocks, 0) * _q5(blocks, 4) + fp16_at(blocks, 2)),
    "Q8_0": BlockType(32, 34, lambda blocks: fp16_at(blocks, 0) * blocks[:, 2:].view(torch.int8).float()),
    "Q4_K": BlockType(256, 144, lambda blocks: _k_blocks(blocks, _k_nibbles(blocks[:, 16:]))),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
}


def row_bytes(width: int, kind: str) -> int:
    """Bytes of a row of `width` numbers; ValueError if it does not divide into whole blocks."""
    block = BLOCK_TYPES[kind]
    if width % block.size:
        raise ValueError(f"a row of {width} numbers is no whole number of {kind} blocks, which have {block.size}")
    return width // block.size * block.bytes


class GgufBase(PackedBase):
    """W (out, in) in blocks of one ggml type. Buffer: `packed`, uint8 (out, bytes of a row), as in the file."""

    packed: Tensor

    def __init__(self, shape: tuple[int, int], kind: str, *, device: torch.device | str = "cpu") -> None:
        super().__init__(shape)
        if kind not in BLOCK_TYPES:
            raise ValueError(f"the type is {kind}; expected one of {', '.join(BLOCK_TYPES)}")
        self.kind = kind
        self.register_buffer("packed", torch.zeros(shape[0], row_bytes(shape[1], kind), dtype=torch.uint8, device=device))

    @property
    def settings(self) -> dict[str, Any]:
        return {"method": "gguf", "shape": list(self.shape), "type": self.kind}

    def _stored_weight(self) -> StoredWeight | None:
        return StoredWeight(GGUF[self.kind], *self.shape, address_of(self.packed))

    def unpack_by_torch(self, out: Tensor, first: int) -> Tensor:
        block, width, packed = BLOCK_TYPES[self.kind], self.shape[1], self.packed[first : first + len(out)]
        step = max(1, tile_size(self.device, width) // width)
        for start in range(0, len(out), step):
            blocks = packed[start : start + step].view(-1, block.bytes)
            out[start : start + step].copy_(block.decode(blocks).view(-1, width))
        return out

    def store(self, weight: Tensor) -> None:
        """Quantises by the gguf package's reference; EnvironmentProblem for a type that it cannot write (the K types)."""
        if importlib.util.find_spec("gguf") is None:
            raise PackageMissing(f"Writing {self.kind} blocks needs the package gguf", "lorakeet[gguf]")
        from gguf import GGMLQuantizationType, quants

        try:
            blocks = quants.quantize(weight.detach().float().cpu().numpy(), GGMLQuantizationType[self.kind])
        except NotImplementedError:
            raise EnvironmentProblem(
                f"Blocks of type {self.kind} can be read and trained on, but not be written here; llama.cpp's own quantiser "
                "writes them: lorakeet export --to gguf --quant q4_k_m."
            ) from None
        self.packed.copy_(torch.from_numpy(blocks))
