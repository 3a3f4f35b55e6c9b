"""Products of bf16 rows with a frozen weight in bf16, as operators of torch (dense.c).

They are torch.mm to rounding: sums in fp32, rounded once. A weight is read as it is stored, and nothing is kept for the number of
tokens, of which oneDNN keeps code (docs/log.md). Where a processor has AMX, oneDNN multiplies, which uses it.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from lorakeet.kernels.cpu import compile, operators
from lorakeet.kernels.cpu.operators import define, loaded, pointers
from lorakeet.kernels.cpu.workspace import ALIGNED, address

AMX = "amx_bf16"  # in /proc/cpuinfo: tiles of bf16, many times what the vectors here multiply


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether x (tokens, ·) is to be multiplied with the weight (out, in) here; one that autograd follows is torch's."""
    if weight.dtype != torch.bfloat16 or weight.dim() != 2 or x.dim() != 2 or len(weight) % operators.LANES or not multiplies():
        return False
    graph = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not graph and weight.numel() > 0 and operators.serves(x.dtype, x, weight)


@functools.cache
def multiplies() -> bool:
    """Whether bf16 weights are for the library on this machine, where it is there; with AMX they are oneDNN's (not measured)."""
    return not compile.has(AMX)


def dense_product(x: Tensor, weight: Tensor, across: bool) -> Tensor:
    """x·Wᵀ, or, `across`, x·W, of a weight (out, in)."""
    y = x.new_empty(len(x), weight.shape[1 if across else 0])
    dense_product_add_(y, x, weight, across, add=False)
    return y


def dense_product_add_(y: Tensor, x: Tensor, weight: Tensor, across: bool, add: bool = True) -> None:
    """Adds that to y (tokens, width), in fp32, rounded once; y shares no memory with x. Without `add`, writes it there."""
    depth, width = weight.shape if across else weight.shape[::-1]
    if x.shape[1] != depth or y.shape != (len(x), width) or not depth or depth % operators.LANES or width % operators.LANES:
        shapes = f"rows {tuple(x.shape)}, a weight {tuple(weight.shape)} and a result {tuple(y.shape)}"
        raise ValueError(f"{shapes} do not fit each other, or are not in whole {operators.LANES}")
    room = torch.empty(scratch(depth, width), dtype=torch.uint8)
    sizes = (ctypes.c_int64(size) for size in (len(x), depth, width))
    given = *pointers(x, weight, y), address(room)
    loaded().dense_product(*given, *sizes, int(across), int(add), torch.get_num_threads())


def workspace(x: Tensor, weight: Tensor, across: bool) -> int:
    """Bytes that a product holds for as long as it computes."""
    depth, width = weight.shape if across else weight.shape[::-1]
    return scratch(depth, width) if depth else 0


def scratch(depth: int, width: int) -> int:
    """Bytes in which sums of so many terms are computed, of so many columns."""
    return ALIGNED + int(loaded().dense_scratch(ctypes.c_int64(depth), ctypes.c_int64(width), torch.get_num_threads()))


def workspace_of_sum(y: Tensor, x: Tensor, weight: Tensor, across: bool, *_: object) -> int:
    """The same of `dense_product_add_`."""
    return workspace(x, weight, across)


def flops(x: Tensor, weight: Tensor, *_: object, **__: object) -> int:
    """Of the product."""
    return 2 * len(x) * weight.numel()


def flops_of_sum(y: Tensor, x: Tensor, weight: Tensor, *_: object, **__: object) -> int:
    """The same of `dense_product_add_`."""
    return flops(x, weight)


DENSE_PRODUCT = define(
    "dense_product(Tensor x, Tensor weight, bool across) -> Tensor",
    dense_product,
    lambda x, weight, across: x.new_empty(len(x), weight.shape[int(across)]),
)
DENSE_PRODUCT_ADD = define(
    "dense_product_add_(Tensor(a!) y, Tensor x, Tensor weight, bool across, bool add=True) -> ()",
    dense_product_add_,
    lambda *_: None,
)
