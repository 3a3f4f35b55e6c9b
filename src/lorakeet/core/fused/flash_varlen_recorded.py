"""Causal attention of rows whose places are read from a tensor, by torch's flash kernel on a CUDA card. **Not run on a GPU yet.**

core/fused/flash_varlen is told by the host how long rows are, and lays them out anew for every micro-batch. A recorded pass
(models/text/cuda_graphs) is told nothing: the numbers it works with lie at addresses that never change, where a row begins among
them.
How many rows there are, and the longest that any may be, are part of what is recorded; a place that no row takes is a row without
tokens. Rows share no prefix here.

What proves the kernel is core/fused/flash_varlen: it is the same, told of the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorakeet.core.fused.flash_varlen import EVERYTHING, EVERYWHERE, FlashVarlen, Sequences, flash_backward, flash_forward
from lorakeet.kernels.cpu.attention import attention_backward_shapes, attention_shapes
from lorakeet.kernels.cpu.operators import define


@dataclass(frozen=True, eq=False)
class RowOffsets:
    """Where rows lie among the tokens: row i from starts[i] to starts[i + 1], int32, the last of which is how many tokens there
    are; none has more than `longest`."""

    starts: Tensor  # (rows + 1,)
    longest: int


class FlashVarlenAtOffsets(FlashVarlen):
    """Attention of rows at `places`, for core/fused/packed_attention.CausalRows; `window` as in CardRows."""

    def __init__(self, places: RowOffsets, scale: float, window: int | None = None) -> None:
        self.laid = places.starts, places.longest, scale, EVERYTHING if window is None else window

    @property
    def operators(self) -> tuple[Any, Any]:
        return OFFSET_ROWS, OFFSET_ROWS_BACKWARD


def flash_kernel(
    places: RowOffsets | None, rows: tuple[int, ...], scale: float, prefix: int, window: int | None = None
) -> FlashVarlen:
    """The kernel for rows of those lengths, or of those places where there are any."""
    return FlashVarlen(rows, scale, prefix, window) if places is None else FlashVarlenAtOffsets(places, scale, window)


def offset_rows(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """O (tokens, heads, d) and the logs of the sums (heads, tokens) of q, and k and v (tokens, kv, d); `given` are starts, the
    longest, scale and window."""
    starts, longest, scale, window = given
    return flash_forward(Sequences(starts, starts, longest, longest), (q, k, v), scale, window)


def offset_rows_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """∂Q, ∂K and ∂V in the shapes of q, k and v, from what `offset_rows` was given and gave."""
    starts, longest, scale, window = given
    return flash_backward(Sequences(starts, starts, longest, longest), (grad, q, k, v, out, logs), scale, window)


_STATES, _LAID = "Tensor q, Tensor k, Tensor v", "Tensor starts, int longest, float scale, int window"
OFFSET_ROWS = define(
    f"offset_rows({_STATES}, {_LAID}) -> (Tensor, Tensor)",
    offset_rows,
    attention_shapes,
    key=EVERYWHERE,
)
OFFSET_ROWS_BACKWARD = define(
    f"offset_rows_backward(Tensor grad, {_STATES}, Tensor out, Tensor logs, {_LAID}) -> (Tensor, Tensor, Tensor)",
    offset_rows_backward,
    attention_backward_shapes,
    key=EVERYWHERE,
)
