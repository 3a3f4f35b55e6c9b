"""A changed weight back into the layout of a quantised file: rounded to the nearest, or with GPTQ's error feedback.

W + ΔW lies between the values that a few bits can take, and ΔW is mostly smaller than the gaps: rounding to the nearest takes
most of it away again. With error feedback (quant/gptq_solve) the columns still to come make up for each rounding, so that what
is lost is spread where the layer's inputs do not see it. The scales are those of the file, or fitted to the changed weight in
the file's own groups; whichever moves the layer's outputs less is taken.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """What can be trained on: a grid, and the numbers that were rounded to it. Both are as large as the weight in fp32."""

    grid: FixedGrid
    numbers: Tensor  # (out, in) fp32: what each one was when it was rounded, its share of the others' errors included


@dataclass(frozen=True)
class Requantised:
    """A weight on a grid, and how it came there."""

    base: PackedBase
    latent: Latent | None  # None where it is not asked for
    scales: Scales
    error: float  # ‖X·(W − W′)ᵀ‖ / ‖X·Wᵀ‖ on the inputs X


def bytes_of_rounding(numbers: int, method: str, packed: int) -> int:
    """The most that `round_with_feedback` holds beside a weight of so many numbers, of `packed` bytes in `method`, and its inputs
    (tests count it).

    The columns on their walk and their codes, five bytes a number, with NF4's grid nine, steps and offsets of groups, a quarter
    of a byte, and two packed forms; in GGUF's types eight bytes while scales are fitted. In a weight that is not much more than a
    part of it (quant/packed), what is held of such a part while the outputs are compared: up to 20.
    """
    walking = {"nf4": 9, "gguf": 8}.get(method, 5) * numbers + numbers // 4 + 2 * packed
    return max(walking, min(20 * numbers, 3 * numbers + 3 * PART_BYTES + PACKING * TILE))


def round_to_nearest(like: PackedBase, weight: Tensor) -> PackedBase:
    """`weight` (out, in) in the layout of `like`, as a quantiser without data makes it: scales fitted, numbers rounded."""
    return requantise_like(like, weight.detach().float())


def round_with_feedback(
    like: PackedBase, weight: Tensor, inputs: Sensitivity, hessian: RowSource, *, latent: bool = False
) -> Requantised:
    """`weight` (out, in) in the layout of `like`, such that the outputs on the inputs of H (in, in) change least.

    With `latent` the numbers before rounding are kept, for who trains on.
    """
    wide = weight.detach().float()
    kept = _on(grid_of(like), "kept", wide, inputs, hessian, latent)
    other = _on(grid_of(requantise_like(like, wide)), "fitted", wide, inputs, hessian, latent)
    return min((kept, other), key=lambda found: found.error)


def _on(grid: FixedGrid, scales: Scales, weight: Tensor, inputs: Sensitivity, hessian: RowSource, latent: bool) -> Requantised:
    walk = ColumnRounding(weight, inputs)
    walk.run(_nearest(grid, inputs.order.tolist()))
    numbers = Latent(grid, walk.in_order(walk.columns)) if latent else None
    base = grid.filled(walk.taken_codes())
    del walk
    return Requantised(base, numbers, scales, output_error(weight, base, hessian))


def _nearest(grid: FixedGrid, columns: list[int]) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    return lambda numbers, place: grid.column(numbers, columns[place])
