"""A frozen weight as Triton kernels read it, and that they are asked for; whether they run is decided in core/kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Kernels:
    """That the kernels are asked for, and up to how many tokens a product runs fused; 0: never."""

    tokens: int = 64


@dataclass(frozen=True)
class InTiles:
    """A weight (out, in) of which parts can be brought into registers.

    `load` is a Triton function (what it is given: kernels/triton/tiles). `tensors` are handed to it as pointers, `how` as numbers
    that are known when it is compiled.
    """

    load: Any
    tensors: tuple[Tensor, ...]
    shape: tuple[int, int]
    how: tuple[int, ...]
