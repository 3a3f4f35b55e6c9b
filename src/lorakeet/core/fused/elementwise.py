"""Who makes the passes between the products of a block, each in one: C on a CPU, Triton on a card where asked for, or nobody.

Nobody means that torch's own operations make them, written out where they are needed (core/fused/mlp_and_norm,
core/fused/attention).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lorakeet.core import kernels as triton_kernels
from lorakeet.kernels.cpu import elementwise, operators
from lorakeet.kernels.tiled_weight import TritonRequest


class Passes(NamedTuple):
    """Functions as kernels/cpu/operators has them."""

    norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    norm_again: Callable[[Tensor, Tensor, Tensor], Tensor]
    norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]
    gated_backward_: Callable[[Tensor, Tensor, Tensor], None]
    turn_: Callable[[Tensor, Tensor, Tensor, bool], None]


IN_C = Passes(
    elementwise.norm, elementwise.norm_again, elementwise.norm_backward,
    elementwise.gated, elementwise.gated_backward_, elementwise.rotate_,
)
WIDEST = 1 << 14  # numbers of a row, which a program of Triton's holds at once


def passes_over(
    *states: Tensor, kernels: TritonRequest | None = None, width: int = operators.LANES, by_rows: bool = False
) -> Passes | None:
    """Who makes passes over these states, all of one dtype, whose last dimensions are multiples of `width` for C; None: torch.

    `kernels`: whether Triton's are asked for; `by_rows`: whether these are norms, which hold a whole row.
    """
    if operators.serves(states[0].dtype, *states, width=width):
        return IN_C
    if kernels is None or not triton_kernels.runs_on(kernels, *states):
        return None
    first = states[0].dtype
    if first not in triton_kernels.DTYPES or any(each.dtype != first or not each.is_contiguous() for each in states):
        return None
    return None if by_rows and states[0].shape[-1] > WIDEST else _of_triton()


def _of_triton() -> Passes:
    from lorakeet.kernels.triton import elementwise as found

    return Passes(found.norm, found.norm_again, found.norm_backward, found.gated, found.gated_backward_, found.rotate_)
