"""MXFP4: 32 numbers of four bits (E2M1) that share a power of two, as gpt-oss publishes its experts.

    blocks   uint8 (…, rows, groups, 16)    the low half of a byte before the high one
    scales   uint8 (…, rows, groups)        2^(scale − 127)

The Open Compute Project's Microscaling Formats specification 1.0, §5. Every number is a bf16 number, so nothing is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakeet.quant.packed import PackedBase, tile_size

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GROUP = 32
_BIAS, _LARGEST_POWER = 127, 2  # of the scales; of the levels: 6 is 1.5 · 2²


class Mxfp4Base(PackedBase):
    """W (out, in) in MXFP4. Buffers: `packed` uint8 (out, in / 2), and `scale` uint8 (out, in / 32), the powers of two."""

    packed: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, int], *, device: torch.device | str = "cpu") -> None:
        super().__init__(shape)
        if shape[1] % GROUP:
            raise ValueError(f"the weight has {shape[1]} columns; MXFP4 has groups of {GROUP}")
        self.register_buffer("packed", torch.zeros((shape[0], shape[1] // 2), dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.zeros((shape[0], shape[1] // GROUP), dtype=torch.uint8, device=device))

    @property
    def settings(self) -> dict[str, Any]:
        return {"method": "mxfp4", "shape": list(self.shape)}

    def unpack_by_torch(self, out: Tensor, first: int) -> Tensor:
        step = max(1, tile_size(self.device, self.shape[1]) // self.shape[1])
        for start in range(0, len(out), step):
            rows = slice(first + start, first + min(start + step, len(out)))
            out[start : start + step].copy_(_numbers(self.packed[rows], self.scale[rows]))
        return out

    def store(self, weight: Tensor) -> None:
        """Rounds `weight` to the nearest level of each group, whose power of two is that of its largest number (§6.3)."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the weight is {tuple(weight.shape)}, but this base is {self.shape}")
        groups = weight.detach().float().to(self.device).view(len(weight), -1, GROUP)
        largest = groups.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
        power = (torch.frexp(largest).exponent - 1 - _LARGEST_POWER).clamp(-_BIAS, _BIAS)
        shares = torch.ldexp(groups, -power[..., None])
        positive = torch.tensor(LEVELS[:8], device=self.device)
        codes = torch.bucketize(shares.abs(), (positive[:-1] + positive[1:]) / 2) + 8 * (shares < 0)
        codes = codes.to(torch.uint8).flatten(1)
        self.packed.copy_(codes[:, ::2] | (codes[:, 1::2] << 4))
        self.scale.copy_(power + _BIAS)


def unpacked_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (…, rows, columns) of the numbers in blocks of that shape."""
    return (*blocks[:-2], blocks[-2] * GROUP)


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The numbers in bf16, (…, rows, columns); a matrix at a time is unpacked in fp32."""
    out = torch.empty(unpacked_shape(tuple(blocks.shape)), dtype=torch.bfloat16)
    matrices = out.view(-1, *out.shape[-2:])
    for number, (packed, exponents) in enumerate(zip(blocks.flatten(0, -4), scales.flatten(0, -3), strict=True)):
        matrices[number] = _numbers(packed.flatten(-2), exponents)
    return out


def _numbers(packed: Tensor, scale: Tensor) -> Tensor:
    """Bytes (rows, columns / 2) and powers of two (rows, columns / 32) to numbers (rows, columns), fp32."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
    levels = torch.tensor(LEVELS, device=packed.device)[codes].view(*scale.shape, GROUP)
    return torch.ldexp(levels, scale.to(torch.int32)[..., None] - _BIAS).flatten(-2)
