"""MXFP4: 32 numbers of four bits (E2M1) that share a power of two, as gpt-oss publishes its experts.

    blocks   uint8 (…, rows, groups, 16)    the low half of a byte before the high one
    scales   uint8 (…, rows, groups)        2^(scale − 127)

The Open Compute Project's Microscaling Formats specification 1.0, §5. Every number is a bf16 number, so nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GROUP = 32
_BIAS = 127


def unpacked_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (…, rows, columns) of the numbers in blocks of that shape."""
    return (*blocks[:-2], blocks[-2] * GROUP)


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The numbers in bf16, (…, rows, columns); a matrix at a time is unpacked in fp32."""
    out = torch.empty(unpacked_shape(tuple(blocks.shape)), dtype=torch.bfloat16)
    levels = torch.tensor(LEVELS)
    matrices = out.view(-1, *out.shape[-2:])
    for number, (packed, exponents) in enumerate(zip(blocks.flatten(0, -4), scales.flatten(0, -3), strict=True)):
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
        values = torch.ldexp(levels[codes], exponents.to(torch.int32)[..., None] - _BIAS)
        matrices[number] = values.flatten(-2)
    return out
