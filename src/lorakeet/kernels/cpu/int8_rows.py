"""Products of rows quantised to int8 with a weight in int8, as operators of torch (int8_rows.c).

They compute what torch's own operations do (quant/int8), for finite rows to the last bit, since integer sums are exact; but
results below 1.2e-38 are zeros. The weight is read as it is stored; the int32 sums stay in registers.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu import compile, operators
from lorakeet.kernels.cpu.operators import define, loaded, pointers
from lorakeet.kernels.protocol import Situation

OUTLIERS = 8  # most outlier columns of x that stay in bf16 (docs/log)
AMX = "amx_int8"  # in /proc/cpuinfo: tiles of int8, which oneDNN uses (not measured)
MOST = 1 << 17  # terms of a sum that fits into int32
NEEDS = f"contiguous bfloat16 rows, widths in multiples of {operators.LANES} up to {MOST}"


def why_not(situation: Situation) -> str:
    """Why products in int8 do not run here."""
    return operators.why_not(situation) or ("oneDNN multiplies faster, with AMX" if compile.has(AMX) else "")


def takes(x: Tensor) -> bool:
    """True for rows x (tokens, width) that C can quantise and multiply."""
    return operators.takes((x,)) and x.shape[-1] <= MOST


def outliers_of(width: int) -> int:
    """The number of outlier columns in rows of this width."""
    return min(OUTLIERS, width // 32 * 2)


def outlier_columns(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The columns (count,) of x (tokens, width) with the largest absolute values, and their values (tokens, count)."""
    if x.dim() != 2 or x.shape[1] % operators.LANES or not 0 <= count <= min(OUTLIERS, x.shape[1]) or count % 2:
        wanted = f"expected an even number up to {OUTLIERS}, and widths in whole {operators.LANES}"
        raise ValueError(f"{count} outlier columns of {tuple(x.shape)}: {wanted}")
    columns, apart = x.new_empty(count, dtype=torch.int64), x.new_empty(len(x), count)
    peaks = x.new_empty(x.shape[1], dtype=torch.int16)
    (numbers,), (places,), (scratch,) = pointers(x), pointers(columns, dtype=torch.int64), pointers(peaks, dtype=torch.int16)
    sizes = (ctypes.c_int64(size) for size in (*x.shape, count))
    loaded().outlier_columns(numbers, scratch, places, *pointers(apart), *sizes, torch.get_num_threads())
    return columns, apart


def quantise_rows(x: Tensor, by: Tensor | None, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantises x, or x ∘ by (width,) in fp32: codes (q + 128) in uint8 (tokens, width), and the step of each row (tokens, 1).

    The outlier `columns` (count,) are quantised as zeros.
    """
    if x.dim() != 2 or x.shape[1] % operators.LANES or (by is not None and by.shape != x.shape[1:]):
        factor = "no factor" if by is None else f"a factor {tuple(by.shape)}"
        raise ValueError(f"rows {tuple(x.shape)} and {factor} do not fit each other, or are not in whole {operators.LANES}")
    codes, steps = torch.empty_like(x, dtype=torch.uint8), x.new_empty(len(x), 1, dtype=torch.float32)
    wide = pointers(*([] if by is None else [by]), steps, dtype=torch.float32)
    first = None if by is None else wide[0]
    sizes = ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1])
    given = *pointers(x), first, *_places(columns, x.shape[1])
    loaded().quantise_rows(*given, *pointers(codes, dtype=torch.uint8), wide[-1], *sizes, torch.get_num_threads())
    return codes, steps


def _places(columns: Tensor | None, width: int) -> tuple[ctypes.c_void_p | None, ctypes.c_int64]:
    """The outlier columns and their number for C, which does not check them."""
    if columns is None:
        return None, ctypes.c_int64(0)
    if columns.dim() != 1 or len(columns) > OUTLIERS or len(columns) % 2 or not bool(((columns >= 0) & (columns < width)).all()):
        raise ValueError(f"expected an even number of columns below {width}, {OUTLIERS} at most; given: {columns.tolist()}")
    return pointers(columns, dtype=torch.int64)[0], ctypes.c_int64(len(columns))


def int8_product(  # noqa: PLR0917 - an operator of torch
    codes: Tensor,
    steps: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    across: bool,
    columns: Tensor | None = None,
    apart: Tensor | None = None,
) -> Tensor:
    """(steps ∘ (q·Wᵀ) + apart·Wᵀ[columns]) ∘ scale, or steps ∘ (q·W) if `across`, in bf16, of W (out, in) in int8.

    Without a scale it counts as ones. `apart` (tokens, count) are the outlier `columns` of x, which the codes have zeros for.
    """
    width, depth = weight.shape if not across else weight.shape[::-1]
    alike = codes.shape[1] == depth and len(steps) == len(codes) and (scale is None or (not across and len(scale) == width))
    alike = alike and (columns is None) == (apart is None) and not (across and columns is not None)
    alike = alike and (columns is None or apart is None or apart.shape == (len(codes), len(columns)))
    if not alike or depth % operators.LANES:
        shapes = f"codes {tuple(codes.shape)}, {len(steps)} steps, a weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes} and its scale do not fit each other, or the codes are not in whole {operators.LANES}")
    y = codes.new_empty(len(codes), width, dtype=torch.bfloat16)
    scratch = codes.new_empty(_workspace(codes, steps, weight, scale, across))
    narrow, (signed,), (out,) = pointers(codes, scratch, dtype=torch.uint8), pointers(weight, dtype=torch.int8), pointers(y)
    wide = pointers(steps, *([] if scale is None else [scale]), dtype=torch.float32)
    places, count = _places(columns, depth)
    kept = None if apart is None else pointers(apart)[0]
    given = narrow[0], wide[0], signed, None if scale is None else wide[1], places, kept, count, out, narrow[1]
    sizes = (ctypes.c_int64(size) for size in (len(codes), depth, width))
    loaded().int8_product(*given, *sizes, int(across), _threads(len(codes), width))
    return y


def _threads(tokens: int, width: int) -> int:
    """How many threads compute: at most one for each piece of the result, since each needs a workspace."""
    return int(loaded().int8_threads(ctypes.c_int64(tokens), ctypes.c_int64(width), torch.get_num_threads()))


def _workspace(codes: Tensor, steps: Tensor, weight: Tensor, scale: Tensor | None, across: bool, *_: Any) -> int:
    """Bytes of workspace of `int8_product`."""
    threads = _threads(len(codes), weight.shape[1 if across else 0])
    return threads * int(loaded().int8_scratch(ctypes.c_int64(codes.shape[1])))


def _flops(codes: Tensor, steps: Tensor, weight: Tensor, *more: Any, **_: Any) -> int:
    """FLOPs of the integer product and of the outlier columns."""
    columns = more[2] if len(more) > 2 else None
    return 2 * len(codes) * (weight.numel() + (0 if columns is None else weight.shape[0] * len(columns)))


OUTLIER_COLUMNS = define(
    "outlier_columns(Tensor x, int count) -> (Tensor, Tensor)",
    outlier_columns,
    lambda x, count: (x.new_empty(count, dtype=torch.int64), x.new_empty(len(x), count)),
)
QUANTISE_ROWS = define(
    "quantise_rows(Tensor x, Tensor? by, Tensor? columns=None) -> (Tensor, Tensor)",
    quantise_rows,
    lambda x, *_: (torch.empty_like(x, dtype=torch.uint8), x.new_empty(len(x), 1, dtype=torch.float32)),
)
INT8_PRODUCT = define(
    "int8_product(Tensor codes, Tensor steps, Tensor weight, Tensor? scale, bool across, Tensor? columns=None, "
    "Tensor? apart=None) -> Tensor",
    int8_product,
    lambda codes, _, weight, __, across, *___: codes.new_empty(len(codes), weight.shape[int(across)], dtype=torch.bfloat16),
    _flops,
    _workspace,
)
