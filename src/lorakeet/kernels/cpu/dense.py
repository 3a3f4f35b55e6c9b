"""Products of bf16 rows with a frozen weight in bf16, as operators of torch (dense.c).

They equal torch.mm to rounding: fp32 sums, rounded once. The weight is read as it is stored, and nothing is cached for a number
of tokens, for which oneDNN compiles code (docs/log). Processors with AMX use oneDNN, which supports it.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from lorakeet.kernels.cpu import compile, operators
from lorakeet.kernels.cpu.operators import define, loaded, pointers
from lorakeet.kernels.cpu.workspace import ALIGNED, address
from lorakeet.kernels.protocol import Situation

NEEDS = f"contiguous bfloat16 matrices in multiples of {operators.LANES}, outside of autograd"
AMX = "amx_bf16"  # in /proc/cpuinfo: tiles of bf16, many times faster than vectors


def why_not(situation: Situation) -> str:
    """Why products with frozen weights do not run here."""
    return operators.why_not(situation) or ("" if multiplies() else "oneDNN multiplies faster, with AMX")


def takes(x: Tensor, weight: Tensor) -> bool:
    """True for x (tokens, ·) and a weight (out, in) that C can read; torch multiplies what autograd follows."""
    if weight.dtype is not torch.bfloat16 or weight.dim() != 2 or x.dim() != 2 or len(weight) % operators.LANES:
        return False
    graph = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not graph and weight.numel() > 0 and operators.takes((x, weight))


@functools.cache
def multiplies() -> bool:
    """True if bf16 weights are multiplied by the library on this machine; with AMX oneDNN multiplies them (not measured)."""
    return not compile.has(AMX)


def dense_product(x: Tensor, weight: Tensor, across: bool) -> Tensor:
    """x·Wᵀ, or x·W if `across`, of a weight (out, in)."""
    y = x.new_empty(len(x), weight.shape[1 if across else 0])
    dense_product_add_(y, x, weight, across, add=False)
    return y


def dense_product_add_(y: Tensor, x: Tensor, weight: Tensor, across: bool, add: bool = True) -> None:
    """Adds that to y (tokens, width), in fp32, rounded once; without `add`, writes it there. y shares no memory with x."""
    depth, width = weight.shape if across else weight.shape[::-1]
    if x.shape[1] != depth or y.shape != (len(x), width) or not depth or depth % operators.LANES or width % operators.LANES:
        shapes = f"rows {tuple(x.shape)}, a weight {tuple(weight.shape)} and a result {tuple(y.shape)}"
        raise ValueError(f"{shapes} do not fit each other, or are not in whole {operators.LANES}")
    memory = torch.empty(scratch(depth, width), dtype=torch.uint8)
    sizes = (ctypes.c_int64(size) for size in (len(x), depth, width))
    given = *pointers(x, weight, y), address(memory)
    loaded().dense_product(*given, *sizes, int(across), int(add), torch.get_num_threads())


def _workspace(x: Tensor, weight: Tensor, across: bool) -> int:
    """Bytes of workspace of a product."""
    depth, width = weight.shape if across else weight.shape[::-1]
    return scratch(depth, width) if depth else 0


def scratch(depth: int, width: int) -> int:
    """Bytes of workspace for `width` columns of sums of `depth` terms."""
    return ALIGNED + int(loaded().dense_scratch(ctypes.c_int64(depth), ctypes.c_int64(width), torch.get_num_threads()))


def _flops(x: Tensor, weight: Tensor, *_: object, **__: object) -> int:
    """FLOPs of a product."""
    return 2 * len(x) * weight.numel()


DENSE_PRODUCT = define(
    "dense_product(Tensor x, Tensor weight, bool across) -> Tensor",
    dense_product,
    lambda x, weight, across: x.new_empty(len(x), weight.shape[int(across)]),
    _flops,
    _workspace,
)
DENSE_PRODUCT_ADD = define(
    "dense_product_add_(Tensor(a!) y, Tensor x, Tensor weight, bool across, bool add=True) -> ()",
    dense_product_add_,
    lambda *_: None,
    lambda y, x, weight, *_, **__: _flops(x, weight),
    lambda y, x, weight, across, *_: _workspace(x, weight, across),
)
