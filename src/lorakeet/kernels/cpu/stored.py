"""Frozen weights as they are stored, told to kernels in C, and products of bf16 rows with them, as operators of torch.

A product lays some columns of the weight out in bf16 at a time, in scratch (unpack_panels.c); `bring_back` writes all of it
(stored.c). The numbers are the same, and so are the sums of kernels/cpu/dense.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lorakeet.kernels.cpu import dense, operators
from lorakeet.kernels.cpu.operators import define, loaded, pointers
from lorakeet.kernels.cpu.workspace import address
from lorakeet.kernels.device import is_cpu

DENSE, NF4, GPTQ, INT8, CODED = range(5)  # kinds, as stored.h has them
GGUF = {name: 5 + number for number, name in enumerate(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"))}
NUMBERS = 11  # of a Stored, before what it holds
_CODES = 3  # of these, the address of the codes


class StoredWeight(NamedTuple):
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
    """Whether C may read a weight (out, in) in these tensors."""
    if any(size <= 0 or size % operators.LANES for size in shape):
        return False
    plain = all(type(each) in operators.PLAIN and each.is_contiguous() and is_cpu(each.device) for each in held)
    return plain and operators.in_use()


def at(tensor: Tensor) -> int:
    """Where its numbers begin; 0 for one that has only a shape, as in a rehearsal."""
    return tensor.data_ptr() if type(tensor) in operators.READ else 0


def bring_back(weight: StoredWeight, out: Tensor) -> Tensor:
    """Writes the weight to `out` (out, in), bf16, which it returns; a shape alone is left as it is."""
    if type(out) not in operators.READ:
        return out
    if out.shape != weight[1:3] or not weight.codes:
        raise ValueError(f"a weight {weight[1:3]} is not brought back into {tuple(out.shape)}, or has no numbers")
    numbers = array("q", weight.numbers)
    loaded().stored_back(ctypes.c_void_p(numbers.buffer_info()[0]), *pointers(out), torch.get_num_threads())
    return out


def multiplies(x: Tensor) -> bool:
    """Whether x (tokens, ·) is to be multiplied with weights as they are stored; one that autograd follows is torch's."""
    plain = x.dim() == 2 and not (torch.is_grad_enabled() and x.requires_grad)
    return plain and dense.multiplies() and operators.serves(x.dtype, x)


def product(x: Tensor, weight: StoredWeight, across: bool = False) -> Tensor:
    """x·Wᵀ, or, `across`, x·W, of x (tokens, ·), bf16: each sum in fp32, rounded once."""
    return cast(Tensor, STORED_PRODUCT(x, weight.held, weight.numbers, across))


def add_product(to: Tensor, x: Tensor, weight: StoredWeight, across: bool = False) -> None:
    """Adds that to `to` (tokens, ·), in place, and rounds it with the sum."""
    STORED_PRODUCT_ADD(to, x, weight.held, weight.numbers, across)
    torch.autograd.graph.increment_version(to)


def _product(x: Tensor, held: Sequence[Tensor], numbers: Sequence[int], across: bool) -> Tensor:
    y = _room_of(x, held, numbers, across)
    _write(y, x, numbers, across, add=False)
    return y


def _add_product(y: Tensor, x: Tensor, held: Sequence[Tensor], numbers: Sequence[int], across: bool) -> None:
    _write(y, x, numbers, across, add=True)


def _write(y: Tensor, x: Tensor, numbers: Sequence[int], across: bool, *, add: bool) -> None:
    depth, width = _sizes(numbers, across)
    whole = depth > 0 and not depth % operators.LANES and not width % operators.LANES
    fit = x.shape[1:] == (depth,) and y.shape == (len(x), width) and whole
    if not fit or not numbers[_CODES]:
        shapes = f"rows {tuple(x.shape)}, a weight {tuple(numbers[1:3])} and a result {tuple(y.shape)}"
        raise ValueError(f"{shapes} do not fit each other, are not in whole {operators.LANES}, or the weight has no numbers")
    told, scratch = array("q", numbers), torch.empty(dense.scratch(depth, width), dtype=torch.uint8)
    rows, to = pointers(x, y)
    given = rows, ctypes.c_void_p(told.buffer_info()[0]), to, address(scratch), ctypes.c_int64(len(x))
    loaded().stored_product(*given, int(across), int(add), None, torch.get_num_threads())


def _sizes(numbers: Sequence[int], across: bool) -> tuple[int, int]:
    """Terms of a sum, and columns of the result."""
    out, width = numbers[1:3]
    return (out, width) if across else (width, out)


def _room_of(x: Tensor, held: Sequence[Tensor], numbers: Sequence[int], across: bool) -> Tensor:
    return x.new_empty(len(x), _sizes(numbers, across)[1])


def workspace(x: Tensor, held: Sequence[Tensor], numbers: Sequence[int], across: bool) -> int:
    """Bytes that a product holds for as long as it computes."""
    return dense.scratch(*_sizes(numbers, across))


def workspace_of_sum(y: Tensor, *given: Any) -> int:
    """The same of a product that is added."""
    return workspace(*given)


def flops(x: Tensor, held: Sequence[Tensor], numbers: Sequence[int], *_: object, **__: object) -> int:
    """Of a product."""
    return 2 * len(x) * numbers[1] * numbers[2]


def flops_of_sum(y: Tensor, *given: Any, **_: object) -> int:
    """The same of a product that is added."""
    return flops(*given)


_WEIGHT = "Tensor[] held, int[] numbers, bool across"  # Stored's
STORED_PRODUCT = define(f"stored_product(Tensor x, {_WEIGHT}) -> Tensor", _product, _room_of)
STORED_PRODUCT_ADD = define(f"stored_product_add_(Tensor(a!) y, Tensor x, {_WEIGHT}) -> ()", _add_product, lambda *_: None)
