"""int8 by rows: each row of W keeps its largest absolute value a, and every number one of 255 equal steps in [−a, a].

        W[r, c] = packed[r, c] · scale[r]        scale = a / 127
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakeet.quant.packed import PackedBase, tile_of

STEPS = 127


class Int8Base(PackedBase):
    """W in int8. Buffers: `packed` int8 (out, in) and `scale` fp32 (out,)."""

    packed: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, int], *, device: torch.device | str = "cpu") -> None:
        super().__init__(shape)
        self.register_buffer("packed", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.zeros(shape[0], dtype=torch.float32, device=device))

    @classmethod
    def of(cls, weight: Tensor) -> Int8Base:
        """`weight` (out, in) in any floating dtype, packed on the CPU."""
        base = cls((weight.shape[0], weight.shape[1]))
        base.store(weight)
        return base

    @property
    def settings(self) -> dict[str, Any]:
        return {"method": "int8", "shape": list(self.shape)}

    def store(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the weight is {tuple(weight.shape)}, but this base is {self.shape}")
        weight = weight.detach().cpu()
        for rows in self._tiles(self.shape[0]):
            wide = weight[rows].float()
            scale = wide.abs().amax(1) / STEPS
            inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
            self.packed[rows] = (wide * inverse[:, None]).round_().clamp_(-STEPS, STEPS).to(torch.int8)
            self.scale[rows] = scale

    def unpack(self, out: Tensor, first: int = 0) -> Tensor:
        packed, scale = self.packed[first : first + len(out)], self.scale[first : first + len(out)]
        for rows in self._tiles(len(out)):
            out[rows].copy_(packed[rows].float().mul_(scale[rows, None]))
        return out

    def _tiles(self, rows: int) -> list[slice]:
        """Slices of rows that together cover `rows` of W, each of about a tile."""
        width = self.shape[1]
        step = max(1, tile_of(self.device, width) // max(1, width))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
