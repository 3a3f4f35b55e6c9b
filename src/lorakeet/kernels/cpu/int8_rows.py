"""Rows of bf16 coded in int8, and their products with a weight in int8, as operators of torch (int8_rows.c).

They compute what torch's own operations do (quant/int8), of finite rows to the last bit, since sums of products of whole numbers
are exact; but results below 1.2e-38 are zeros. A product reads the weight as it is stored, and its sums, which are int32, never
leave the processor's registers.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu import compile, operators
from lorakeet.kernels.cpu.operators import define, loaded, pointers

APART = 8  # columns of x at most that are kept in bf16 (docs/log.md)
AMX = "amx_int8"  # in /proc/cpuinfo: tiles of int8, which oneDNN multiplies with (not measured)
MOST = 1 << 17  # terms of a sum that int32 holds


def serves(x: Tensor) -> bool:
    """Whether the rows of x (tokens, width) are to be coded and multiplied here; where there is AMX for int8, that is torch's."""
    return not compile.has(AMX) and operators.serves(x.dtype, x) and x.shape[-1] <= MOST


def apart_of(width: int) -> int:
    """How many columns of rows of this width are kept apart."""
    return min(APART, width // 32 * 2)


def loud_columns(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The columns (count,) of x (tokens, width) with the largest absolute values, and what stands in them (tokens, count)."""
    if x.dim() != 2 or x.shape[1] % operators.LANES or not 0 <= count <= min(APART, x.shape[1]) or count % 2:
        wanted = f"an even number up to {APART} of whole {operators.LANES}"
        raise ValueError(f"{count} columns of {tuple(x.shape)}: wanted are {wanted}")
    columns, apart = x.new_empty(count, dtype=torch.int64), x.new_empty(len(x), count)
    peaks = x.new_empty(x.shape[1], dtype=torch.int16)
    (numbers,), (places,), (scratch,) = pointers(x), pointers(columns, dtype=torch.int64), pointers(peaks, dtype=torch.int16)
    sizes = (ctypes.c_int64(size) for size in (*x.shape, count))
    loaded().loud_columns(numbers, scratch, places, *pointers(apart), *sizes, torch.get_num_threads())
    return columns, apart


def code_rows(x: Tensor, by: Tensor | None, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x, or x ∘ by (width,) in fp32, as (q + 128) in uint8 (tokens, width), and what a step of each row is worth (tokens, 1).

    `columns` (count,) count as zeros.
    """
    if x.dim() != 2 or x.shape[1] % operators.LANES or (by is not None and by.shape != x.shape[1:]):
        factor = "no factor" if by is None else f"a factor {tuple(by.shape)}"
        raise ValueError(f"rows {tuple(x.shape)} and {factor} do not fit each other, or are not in whole {operators.LANES}")
    codes, steps = torch.empty_like(x, dtype=torch.uint8), x.new_empty(len(x), 1, dtype=torch.float32)
    wide = pointers(*([] if by is None else [by]), steps, dtype=torch.float32)
    first = None if by is None else wide[0]
    sizes = ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1])
    given = *pointers(x), first, *_places(columns, x.shape[1])
    loaded().code_rows(*given, *pointers(codes, dtype=torch.uint8), wide[-1], *sizes, torch.get_num_threads())
    return codes, steps


def _places(columns: Tensor | None, width: int) -> tuple[ctypes.c_void_p | None, ctypes.c_int64]:
    """Columns and their number for C, which trusts them."""
    if columns is None:
        return None, ctypes.c_int64(0)
    if columns.dim() != 1 or len(columns) > APART or len(columns) % 2 or not bool(((columns >= 0) & (columns < width)).all()):
        raise ValueError(f"{columns.tolist()} are no even number of columns of {width}, {APART} at most")
    return pointers(columns, dtype=torch.int64)[0], ctypes.c_int64(len(columns))


def coded_product(  # noqa: PLR0917 - an operator of torch
    codes: Tensor,
    steps: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    across: bool,
    columns: Tensor | None = None,
    apart: Tensor | None = None,
) -> Tensor:
    """(steps ∘ (q·Wᵀ) + apart·Wᵀ[columns]) ∘ scale, or, `across`, steps ∘ (q·W), in bf16, of W (out, in) in int8; no scale counts
    as ones. `apart` (tokens, count) are the `columns` of x that the codes have zeros for."""
    width, depth = weight.shape if not across else weight.shape[::-1]
    alike = codes.shape[1] == depth and len(steps) == len(codes) and (scale is None or (not across and len(scale) == width))
    alike = alike and (columns is None) == (apart is None) and not (across and columns is not None)
    alike = alike and (columns is None or apart is None or apart.shape == (len(codes), len(columns)))
    if not alike or depth % operators.LANES:
        shapes = f"codes {tuple(codes.shape)}, {len(steps)} steps, a weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes} and its scale do not fit each other, or the codes are not in whole {operators.LANES}")
    y = codes.new_empty(len(codes), width, dtype=torch.bfloat16)
    scratch = codes.new_empty(workspace(codes, steps, weight, scale, across))
    narrow, (signed,), (out,) = pointers(codes, scratch, dtype=torch.uint8), pointers(weight, dtype=torch.int8), pointers(y)
    wide = pointers(steps, *([] if scale is None else [scale]), dtype=torch.float32)
    places, count = _places(columns, depth)
    kept = None if apart is None else pointers(apart)[0]
    given = narrow[0], wide[0], signed, None if scale is None else wide[1], places, kept, count, out, narrow[1]
    sizes = (ctypes.c_int64(size) for size in (len(codes), depth, width))
    loaded().coded_product(*given, *sizes, int(across), _threads(len(codes), width))
    return y


def _threads(tokens: int, width: int) -> int:
    """How many threads compute: no more than there are pieces of the result, since each has scratch."""
    return int(loaded().coded_threads(ctypes.c_int64(tokens), ctypes.c_int64(width), torch.get_num_threads()))


def workspace(codes: Tensor, steps: Tensor, weight: Tensor, scale: Tensor | None, across: bool, *_: Any) -> int:
    """Bytes that `coded_product` holds for as long as it computes."""
    threads = _threads(len(codes), weight.shape[1 if across else 0])
    return threads * int(loaded().coded_scratch(ctypes.c_int64(codes.shape[1])))


def flops(codes: Tensor, steps: Tensor, weight: Tensor, *more: Any, **_: Any) -> int:
    """Of the product, of whole numbers, and of the columns that are apart."""
    columns = more[2] if len(more) > 2 else None
    return 2 * len(codes) * (weight.numel() + (0 if columns is None else weight.shape[0] * len(columns)))


LOUD_COLUMNS = define(
    "loud_columns(Tensor x, int count) -> (Tensor, Tensor)",
    loud_columns,
    lambda x, count: (x.new_empty(count, dtype=torch.int64), x.new_empty(len(x), count)),
)
CODE_ROWS = define(
    "code_rows(Tensor x, Tensor? by, Tensor? columns=None) -> (Tensor, Tensor)",
    code_rows,
    lambda x, *_: (torch.empty_like(x, dtype=torch.uint8), x.new_empty(len(x), 1, dtype=torch.float32)),
)
CODED_PRODUCT = define(
    "coded_product(Tensor codes, Tensor steps, Tensor weight, Tensor? scale, bool across, Tensor? columns=None, "
    "Tensor? apart=None) -> Tensor",
    coded_product,
    lambda codes, _, weight, __, across, *___: codes.new_empty(len(codes), weight.shape[int(across)], dtype=torch.bfloat16),
)
