"""Quantises a changed weight to the layout of a quantised file: to the nearest values, or with GPTQ's error feedback.

ΔW is mostly smaller than the gaps between the values of a few bits, so rounding W + ΔW to the nearest loses most of it. With
error feedback (quant/gptq_solve) the remaining columns compensate for each rounding, so that the loss lies where the layer's
inputs do not expose it. The scales are those of the file, or fitted to the changed weight in the file's groups, whichever changes
the layer's outputs less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lorakeet.core.tiled_product import RowSource
from lorakeet.quant.gptq_solve import PACKING, ColumnRounding, Sensitivity, output_error
from lorakeet.quant.grids import FixedGrid, grid_of, requantise_like
from lorakeet.quant.packed import PART_BYTES, TILE, PackedBase

Scales = Literal["kept", "fitted"]


@dataclass(frozen=True)
class Latent:
    """The start of quantisation-aware training: a grid, and the numbers before rounding, each as large as the weight in fp32."""

    grid: FixedGrid
    numbers: Tensor  # (out, in) fp32, before rounding, with the adjustments for earlier errors


@dataclass(frozen=True)
class Requantised:
    """A quantised weight, its scales, and its error."""

    base: PackedBase
    latent: Latent | None  # if requested
    scales: Scales
    error: float  # ‖X·(W − W′)ᵀ‖ / ‖X·Wᵀ‖ on the inputs X


def bytes_of_rounding(numbers: int, method: str, packed: int) -> int:
    """Peak bytes of `round_with_feedback` beside a weight of `numbers` numbers, of `packed` bytes in `method`, and its inputs.

    Tests measure it. Columns and codes take five bytes a number, with NF4's grid nine; steps and offsets a quarter of a byte; and
    there are two packed copies. GGUF's types take eight while scales are fitted. For a small weight, of about one part of
    quant/packed, the comparison of outputs takes most: up to 20 bytes a number.
    """
    rounding = {"nf4": 9, "gguf": 8}.get(method, 5) * numbers + numbers // 4 + 2 * packed
    return max(rounding, min(20 * numbers, 3 * numbers + 3 * PART_BYTES + PACKING * TILE))


def round_to_nearest(like: PackedBase, weight: Tensor) -> PackedBase:
    """`weight` (out, in) in the layout of `like`, as by a quantiser without data: fitted scales, nearest values."""
    return requantise_like(like, weight.detach().float())


def round_with_feedback(
    like: PackedBase, weight: Tensor, inputs: Sensitivity, hessian: RowSource, *, latent: bool = False
) -> Requantised:
    """`weight` (out, in) in the layout of `like`, such that the outputs on the inputs of H (in, in) change least.

    With `latent` the numbers before rounding are kept, for further training.
    """
    wide = weight.detach().float()
    kept = _on(grid_of(like), "kept", wide, inputs, hessian, latent)
    other = _on(grid_of(requantise_like(like, wide)), "fitted", wide, inputs, hessian, latent)
    return min((kept, other), key=lambda found: found.error)


def _on(grid: FixedGrid, scales: Scales, weight: Tensor, inputs: Sensitivity, hessian: RowSource, latent: bool) -> Requantised:
    rounding = ColumnRounding(weight, inputs)
    columns = inputs.order.tolist()
    rounding.run(lambda numbers, place: grid.column(numbers, columns[place]))
    numbers = Latent(grid, rounding.in_order(rounding.columns)) if latent else None
    base = grid.filled(rounding.taken_codes())
    del rounding
    return Requantised(base, numbers, scales, output_error(weight, base, hessian))
