"""Frozen weights as they are stored, described to C, and products of bf16 rows with them, as operators of torch.

A product packs a few columns of the weight in bf16 at a time (unpack_panels.c); `dequantise` writes the whole weight (stored.c).
The bits are the same, and so are the sums of kernels/cpu/dense.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lorakeet.kernels.cpu import dense, operators
from lorakeet.kernels.cpu.operators import define, loaded, pointers
from lorakeet.kernels.cpu.workspace import address
from lorakeet.kernels.device import is_cpu
from lorakeet.kernels.protocol import QuantisedWeight, Situation

DENSE, NF4, GPTQ, INT8, INT8_ROWS = range(5)  # kinds, as stored.h has them
GGUF = {name: 5 + number for number, name in enumerate(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"))}
NEEDS = "contiguous bfloat16 rows, outside of autograd"
READABLE = f"whole weights in multiples of {operators.LANES}"
NUMBERS = 11  # of a Stored: the fields before `owners`
_CODES = 3  # index of the address of the codes


class StoredWeight(NamedTuple):
    """A weight (out, width): its kind, and the addresses and numbers of stored.h, valid as long as this object is kept."""

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
    owners: tuple[Tensor, ...] = ()  # the tensors that the addresses belong to, even after their modules get others

    @property
    def numbers(self) -> tuple[int, ...]:
        """The struct that C reads."""
        return self[:NUMBERS]  # type: ignore[return-value]


def why_not(situation: Situation) -> str:
    """Why products with quantised weights do not run here."""
    return dense.why_not(situation)


def why_not_dequantise(situation: Situation) -> str:
    """Why weights are not dequantised here."""
    return operators.why_not(situation)


def is_readable(shape: tuple[int, ...], owners: Iterable[Tensor]) -> bool:
    """True if C may read a weight (out, in) that is stored in these tensors."""
    if any(size <= 0 or size % operators.LANES for size in shape):
        return False
    plain = all(type(each) in operators.PLAIN and each.is_contiguous() and is_cpu(each.device) for each in owners)
    return plain and operators.in_use()


def takes_whole(out: Tensor, weight: QuantisedWeight) -> bool:
    """True if C can write to `out`, and it is for all of the weight."""
    return out.shape == weight.shape and out.is_contiguous()


def address_of(tensor: Tensor) -> int:
    """The address of its numbers; 0 for a tensor that has only a shape, as in a rehearsal."""
    return tensor.data_ptr() if type(tensor) in operators.READ else 0


def dequantise_into(weight: QuantisedWeight, out: Tensor, first: int) -> bool:
    """See kernels/protocol.Dequantiser; `out` is for all rows."""
    read = weight.stored()
    if read is not None:
        dequantise(read, out)
    return read is not None


def dequantise(weight: StoredWeight, out: Tensor) -> Tensor:
    """Dequantises the weight into `out` (out, in), bf16, which is returned; does nothing to a tensor without numbers."""
    if type(out) not in operators.READ:
        return out
    if out.shape != weight[1:3] or not weight.codes:
        raise ValueError(f"a weight {weight[1:3]} does not fit {tuple(out.shape)}, or has no numbers")
    numbers = array("q", weight.numbers)
    loaded().stored_unpack(ctypes.c_void_p(numbers.buffer_info()[0]), *pointers(out), torch.get_num_threads())
    return out


def quantised_product(weight: QuantisedWeight, x: Tensor, across: bool) -> Tensor | None:
    """See kernels/protocol.QuantisedProducts."""
    read = weight.stored()
    return None if read is None else stored_product(x, read, across)


def add_quantised_product(weight: QuantisedWeight, to: Tensor, x: Tensor, across: bool) -> bool:
    """See kernels/protocol.QuantisedProducts."""
    read = weight.stored()
    if read is None or to.dtype != x.dtype or not to.is_contiguous():
        return False
    add_stored_product(to, x, read, across)
    return True


def takes(x: Tensor, *_: object) -> bool:
    """True for x (tokens, ·) that C can multiply with weights as they are stored; torch multiplies if x needs a gradient."""
    return x.dim() == 2 and not (torch.is_grad_enabled() and x.requires_grad) and operators.takes((x,))


def stored_product(x: Tensor, weight: StoredWeight, across: bool = False) -> Tensor:
    """x·Wᵀ, or x·W if `across`, of x (tokens, ·), bf16: fp32 sums, rounded once."""
    return cast(Tensor, STORED_PRODUCT(x, weight.owners, weight.numbers, across))


def add_stored_product(to: Tensor, x: Tensor, weight: StoredWeight, across: bool = False) -> None:
    """Adds the product to `to` (tokens, ·), in place; the sum is rounded once."""
    STORED_PRODUCT_ADD(to, x, weight.owners, weight.numbers, across)
    torch.autograd.graph.increment_version(to)


def _product(x: Tensor, owners: Sequence[Tensor], numbers: Sequence[int], across: bool) -> Tensor:
    y = _empty_result(x, owners, numbers, across)
    _write(y, x, owners, numbers, across, add=False)
    return y


def _write(y: Tensor, x: Tensor, owners: Sequence[Tensor], numbers: Sequence[int], across: bool, *, add: bool = True) -> None:
    """Adds the product to y, or with `add` False writes it there."""
    depth, width = _sizes(numbers, across)
    whole = depth > 0 and not depth % operators.LANES and not width % operators.LANES
    fit = x.shape[1:] == (depth,) and y.shape == (len(x), width) and whole
    if not fit or not numbers[_CODES]:
        shapes = f"rows {tuple(x.shape)}, a weight {tuple(numbers[1:3])} and a result {tuple(y.shape)}"
        raise ValueError(f"{shapes} do not fit each other, are not in whole {operators.LANES}, or the weight has no numbers")
    given_weight, scratch = array("q", numbers), torch.empty(dense.scratch(depth, width), dtype=torch.uint8)
    rows, to = pointers(x, y)
    given = rows, ctypes.c_void_p(given_weight.buffer_info()[0]), to, address(scratch), ctypes.c_int64(len(x))
    loaded().stored_product(*given, int(across), int(add), None, torch.get_num_threads())


def _sizes(numbers: Sequence[int], across: bool) -> tuple[int, int]:
    """Depth of the sums, and width of the result."""
    out, width = numbers[1:3]
    return (out, width) if across else (width, out)


def _empty_result(x: Tensor, owners: Sequence[Tensor], numbers: Sequence[int], across: bool) -> Tensor:
    return x.new_empty(len(x), _sizes(numbers, across)[1])


def _workspace(x: Tensor, owners: Sequence[Tensor], numbers: Sequence[int], across: bool) -> int:
    """Bytes of workspace of a product."""
    return dense.scratch(*_sizes(numbers, across))


def _flops(x: Tensor, owners: Sequence[Tensor], numbers: Sequence[int], *_: object, **__: object) -> int:
    """FLOPs of a product."""
    return 2 * len(x) * numbers[1] * numbers[2]


_WEIGHT = "Tensor[] owners, int[] numbers, bool across"  # Stored's
STORED_PRODUCT = define(f"stored_product(Tensor x, {_WEIGHT}) -> Tensor", _product, _empty_result, _flops, _workspace)
STORED_PRODUCT_ADD = define(
    f"stored_product_add_(Tensor(a!) y, Tensor x, {_WEIGHT}) -> ()",
    _write,
    lambda *_: None,
    lambda y, *given, **_: _flops(*given),
    lambda y, *given: _workspace(*given),
)
