"""Frozen weights as they are stored, told to kernels in C, which bring them back to bf16 (stored.c)."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakeet.core.device import is_cpu
from lorakeet.core.native import ops
from lorakeet.core.native.ops import loaded, pointers

DENSE, NF4, GPTQ, INT8, CODED = range(5)  # kinds, as stored.h has them
GGUF = {name: 5 + number for number, name in enumerate(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"))}
NUMBERS = 11  # of a Stored, before what it holds


class Stored(NamedTuple):
    """A weight (out, width): its kind, and addresses and numbers as stored.h explains them, valid as long as this is kept."""

    kind: int
    out: int
    width: int
    codes: int
    scales: int = 0
    outer: int = 0
    more: int = 0
    levels: int = 0
    steps: int = 0
    size: int = 0
    groups: int = 0
    held: tuple[Tensor, ...] = ()  # what the addresses are of, also when another tensor takes its module's place

    @property
    def numbers(self) -> tuple[int, ...]:
        """What C is told."""
        return self[:NUMBERS]  # type: ignore[return-value]


def serves(shape: tuple[int, int], held: Sequence[Tensor]) -> bool:
    """Whether a weight (out, in) in these tensors may be brought back here."""
    if any(size <= 0 or size % ops.LANES for size in shape):
        return False
    return all(type(each) in ops.PLAIN and each.is_contiguous() and is_cpu(each.device) for each in held) and ops.in_use()


def at(tensor: Tensor) -> int:
    """Where its numbers begin; 0 for one that has only a shape, as in a rehearsal."""
    return tensor.data_ptr() if type(tensor) in ops.READ else 0


def bring_back(weight: Stored, out: Tensor) -> Tensor:
    """Writes the weight to `out` (out, in), bf16, which it returns; a shape alone is left as it is."""
    if type(out) not in ops.READ:
        return out
    if out.shape != weight[1:3] or not weight.codes:
        raise ValueError(f"a weight {weight[1:3]} is not brought back into {tuple(out.shape)}, or has no numbers")
    numbers = array("q", weight.numbers)
    loaded().stored_back(ctypes.c_void_p(numbers.buffer_info()[0]), *pointers(out), torch.get_num_threads())
    return out
