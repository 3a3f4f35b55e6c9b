"""A request for Triton kernels, and a frozen weight as they read it; kernels/choose decides whether they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TritonRequest:
    """Triton kernels are requested; products of at most `tokens` tokens run fused (0: none)."""

    tokens: int = 64


@dataclass(frozen=True)
class TiledWeight:
    """A weight (out, in) of which tiles can be loaded into registers.

    `load` is a Triton function (signature: kernels/triton/tiles). `tensors` are passed to it as pointers, `how` as compile-time
    numbers. A product has at most `stages` tiles of it on their way at once.
    """

    load: Any
    tensors: tuple[Tensor, ...]
    shape: tuple[int, int]
    how: tuple[int, ...]
    stages: int = 3
