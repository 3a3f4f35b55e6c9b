"""Rows of bf16 coded in int8, and their products with a weight in int8, as operators of torch (coded.c).

They compute what torch's own operations do (quant/int8), to the last bit: sums of products of whole numbers are exact. A product
reads the weight as it is stored, and its sums, which are int32, never leave the processor's registers.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lorakeet.core.native import ops
from lorakeet.core.native.ops import at, define, loaded

PANEL, TOKENS = 64, 240  # as in coded.c: columns and tokens of the result that are computed at once
MOST = 1 << 17  # terms of a sum that int32 holds


def serves(x: Tensor) -> bool:
    """Whether the rows of x (tokens, width) are to be coded and multiplied here."""
    return ops.serves(x.dtype, x) and x.shape[-1] <= MOST


def code_rows(x: Tensor, by: Tensor | None) -> tuple[Tensor, Tensor]:
    """x, or x ∘ by (width,) in fp32, as (q + 128) in uint8 (tokens, width), and what a step of each row is worth (tokens, 1)."""
    codes, steps = torch.empty_like(x, dtype=torch.uint8), torch.empty(len(x), 1)
    wide = at(*([] if by is None else [by]), steps, dtype=torch.float32)
    first = None if by is None else wide[0]
    sizes = ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1])
    loaded().code_rows(*at(x), first, *at(codes, dtype=torch.uint8), wide[-1], *sizes, torch.get_num_threads())
    return codes, steps


def coded_product(codes: Tensor, steps: Tensor, weight: Tensor, scale: Tensor | None, across: bool) -> Tensor:
    """steps ∘ (q·Wᵀ) ∘ scale, or, `across`, steps ∘ (q·W) ∘ scale, in bf16, of W (out, in) in int8; no scale counts as ones."""
    width, depth = weight.shape if not across else weight.shape[::-1]
    if codes.shape[1] != depth or depth % ops.LANES or len(steps) != len(codes) or (scale is not None and len(scale) != width):
        shapes = f"codes {tuple(codes.shape)}, {len(steps)} steps, a weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes} and its scale do not fit each other, or the codes are not in whole {ops.LANES}")
    y = torch.empty(len(codes), width, dtype=torch.bfloat16)
    scratch = torch.empty(workspace(codes, steps, weight, scale, across), dtype=torch.uint8)
    narrow, (signed,), (out,) = at(codes, scratch, dtype=torch.uint8), at(weight, dtype=torch.int8), at(y)
    wide = at(steps, *([] if scale is None else [scale]), dtype=torch.float32)
    given = narrow[0], wide[0], signed, None if scale is None else wide[1], out, narrow[1]
    sizes = (ctypes.c_int64(size) for size in (len(codes), depth, width))
    loaded().coded_product(*given, *sizes, int(across), _threads(len(codes), width))
    return y


def _threads(tokens: int, width: int) -> int:
    """How many threads compute: no more than there are pieces of the result, since each has scratch."""
    return max(1, min(torch.get_num_threads(), -(-tokens // TOKENS) * -(-width // PANEL)))


def workspace(codes: Tensor, steps: Tensor, weight: Tensor, scale: Tensor | None, across: bool) -> int:
    """Bytes that `coded_product` holds for as long as it computes."""
    return _threads(len(codes), weight.shape[1 if across else 0]) * PANEL * codes.shape[1]


def flops(codes: Tensor, steps: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Of the product, of whole numbers."""
    return 2 * len(codes) * weight.numel()


CODE_ROWS = define(
    "code_rows(Tensor x, Tensor? by) -> (Tensor, Tensor)",
    code_rows,
    lambda x, _: (torch.empty_like(x, dtype=torch.uint8), x.new_empty(len(x), 1, dtype=torch.float32)),
)
CODED_PRODUCT = define(
    "coded_product(Tensor codes, Tensor steps, Tensor weight, Tensor? scale, bool across) -> Tensor",
    coded_product,
    lambda codes, _, weight, __, across: codes.new_empty(len(codes), weight.shape[1 if across else 0], dtype=torch.bfloat16),
)
