"""Weights of eight bits with an exponent of their own (float8 E4M3), a scale for each block of rows and columns.

        W[r, c] = float8(packed[r, c]) · scale[r // rows, c // columns]

One block may be the whole matrix, a row, or 128 × 128 numbers, as DeepSeek-V3 and Qwen publish them
(https://arxiv.org/abs/2412.19437, §3.3). Micikevicius 2022, https://arxiv.org/abs/2209.05433, is E4M3: its largest number is 448.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakeet.quant.packed import PackedBase, tile_size

LARGEST = 448.0
Block = tuple[int, int]  # rows and columns that share a scale


def scale_shape(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """The shape of the scales of a matrix."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


class Fp8Base(PackedBase):
    """W (out, in) in float8. Buffers: `packed` uint8 (out, in), the bytes of E4M3 numbers, and `scale` fp32, one a block."""

    packed: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, int], block: Block, *, device: torch.device | str = "cpu") -> None:
        super().__init__(shape)
        self.block = block
        self.register_buffer("packed", torch.zeros(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.zeros(scale_shape(shape, block), dtype=torch.float32, device=device))

    @property
    def settings(self) -> dict[str, Any]:
        return {"method": "fp8", "shape": list(self.shape), "block": list(self.block)}

    def unpack_by_torch(self, out: Tensor, first: int) -> Tensor:
        (rows, columns), width = self.block, self.shape[1]
        step = max(1, tile_size(self.device, width) // width)
        for start in range(0, len(out), step):
            part = out[start : start + step]
            own = torch.arange(first + start, first + start + len(part), device=self.device) // rows
            scales = self.scale[own].repeat_interleave(columns, dim=1)[:, :width]
            packed = self.packed[first + start : first + start + len(part)].view(torch.float8_e4m3fn)
            part.copy_(packed.float().mul_(scales))
        return out

    def store(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the weight is {tuple(weight.shape)}, but this base is {self.shape}")
        rows, columns = self.block
        weight = weight.detach().float().to(self.device)
        for row in range(self.scale.shape[0]):
            for column in range(self.scale.shape[1]):
                place = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
                scale = (weight[place].abs().amax() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
                self.scale[row, column] = scale
                self.packed[place] = (weight[place] / scale).to(torch.float8_e4m3fn).view(torch.uint8)
