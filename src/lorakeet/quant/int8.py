"""int8 by rows: each row of W keeps its largest absolute value a, and every number one of 255 equal steps in [−a, a].

        W[r, c] = packed[r, c] · scale[r]        scale = a / 127

In training, products can run in int8 too (`in_int8`): each row of the other factor is quantised in the same way, q·t = x, and

        x·Wᵀ = t ∘ (q·packedᵀ) ∘ scale        g·W = t ∘ (q·packed), where q·t = g ∘ scale

with exact sums in int32. Quantising a row of normal numbers moves it by about 0.8 % of its norm. Outputs of a model's norm layers
have a few columns that are large in every row. The eight largest of x are multiplied apart, in x's own dtype (LLM.int8, Dettmers
2022, https://arxiv.org/abs/2208.07339), which makes the error of q, k and v five times smaller (docs/log). All rows of one
product share these columns. Evaluation never multiplies in int8.
On a CPU with the C library, rows of bf16 are quantised and multiplied by kernels/cpu/int8_rows, others by torch
(kernels/choose.int8_products); the bits are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.core.base import QuantisedRows
from lorakeet.kernels.choose import int8_products
from lorakeet.kernels.cpu import int8_rows
from lorakeet.kernels.cpu.stored import INT8, StoredWeight, address_of
from lorakeet.kernels.device import is_cpu
from lorakeet.quant.packed import PackedBase, tile_size

STEPS = 127


class Int8Base(PackedBase):
    """W in int8. Buffers: `packed` int8 (out, in) and `scale` fp32 (out,)."""

    packed: Tensor
    scale: Tensor
    in_int8 = False  # products run in int8 while the model is in training mode

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
            steps, scale = _in_steps(weight[rows].float())
            self.packed[rows] = steps.clamp_(-STEPS, STEPS).to(torch.int8)
            self.scale[rows] = scale[:, 0]

    def _stored_weight(self) -> StoredWeight | None:
        return StoredWeight(INT8, *self.shape, address_of(self.packed), address_of(self.scale))

    def unpack_by_torch(self, out: Tensor, first: int) -> Tensor:
        packed, scale = self.packed[first : first + len(out)], self.scale[first : first + len(out)]
        for rows in self._tiles(len(out)):
            out[rows].copy_(packed[rows].float().mul_(scale[rows, None]))
        return out

    def matmul(self, x: Tensor) -> Tensor:
        return self.matmul_int8(self.quantise(x)) if self.runs_in_int8(x) else super().matmul(x)

    def matmul_t(self, grad: Tensor) -> Tensor:
        if not self.runs_in_int8(grad):
            return super().matmul_t(grad)
        if (kernel := int8_products(grad)) is not None:
            codes, scale = kernel.QUANTISE_ROWS(grad, self.scale)
            return kernel.INT8_PRODUCT(codes, scale, self.packed, None, True)
        steps, scale = _in_steps(grad * self.scale)
        packed = self.packed if is_cpu(grad.device) else self.packed.t().contiguous().t()  # cuBLASLt takes columns alone
        return torch._int_mm(steps.to(torch.int8), packed).float().mul_(scale).to(grad.dtype)

    def add_matmul_t(self, to: Tensor, grad: Tensor) -> None:
        if self.runs_in_int8(grad):
            to.add_(self.matmul_t(grad))
        else:
            super().add_matmul_t(to, grad)

    def quantise(self, x: Tensor) -> QuantisedRows:
        """Quantises x (tokens, in) to int8 for torch, or to a kernel's own codes; its largest columns are kept apart."""
        count = int8_rows.outliers_of(x.shape[1]) if len(x) else 0
        if (kernel := int8_products(x)) is not None:
            columns, apart = kernel.OUTLIER_COLUMNS(x, count)
            codes, scale = kernel.QUANTISE_ROWS(x, None, columns)
            return QuantisedRows(codes, scale, x.dtype, columns, apart, kernel)
        if not count:
            steps, scale = _in_steps(x)
            return QuantisedRows(steps.to(torch.int8), scale, x.dtype)
        columns = x.abs().amax(0).topk(count).indices
        steps, scale = _in_steps(x.index_fill(1, columns, 0))
        return QuantisedRows(steps.to(torch.int8), scale, x.dtype, columns, x[:, columns])

    def matmul_int8(self, rows: QuantisedRows) -> Tensor:
        """Returns what `matmul` returns for the x that `quantise` took."""
        codes, steps, dtype, columns, apart, kernel = rows
        if kernel is not None:
            return kernel.INT8_PRODUCT(codes, steps, self.packed, self.scale, False, columns, apart)
        y = torch._int_mm(codes, self.packed.t()).float().mul_(steps)
        if columns is not None and apart is not None:
            y.addmm_(apart.float(), self.packed[:, columns].float().t())
        return y.mul_(self.scale).to(dtype)

    def runs_in_int8(self, x: Tensor) -> bool:
        """True if x (tokens, ·) is multiplied in int8. CUDA needs over 16 tokens and sizes in whole 8; not run on a GPU."""
        if not (self.in_int8 and self.training) or x.shape[-1] > int8_rows.MOST:
            return False
        fits = len(x) > 16 and all(size % 8 == 0 for size in self.shape)
        return x.device.type == "cpu" or (x.device.type == "cuda" and fits)

    def _tiles(self, rows: int) -> list[slice]:
        """Slices that cover `rows` rows of W, each about a tile."""
        width = self.shape[1]
        step = max(1, tile_size(self.device, width) // max(1, width))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def enable_int8_products(model: nn.Module) -> int:
    """Lets every int8 weight of `model` multiply in int8 during training; returns their number."""
    bases = [base for base in model.modules() if isinstance(base, Int8Base)]
    for base in bases:
        base.in_int8 = True
    return len(bases)


@contextmanager
def exact_products(model: nn.Module) -> Iterator[None]:
    """Context manager: no int8 weight of `model` multiplies in int8, even in training mode."""
    bases = [base for base in model.modules() if isinstance(base, Int8Base) and base.in_int8]
    for base in bases:
        base.in_int8 = False
    try:
        yield
    finally:
        for base in bases:
            base.in_int8 = True


def _in_steps(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of (n, width) to its own 127 steps; returns the steps, fp32 (n, width), and their size, fp32 (n, 1)."""
    scale = rows.abs().amax(1, keepdim=True).float().div_(STEPS)
    inverse = 1 / scale
    inverse = torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))  # for zeros and tiny steps
    return (rows * inverse).round_(), torch.where(scale.isfinite(), scale, torch.full_like(scale, math.nan))
