"""Where tests of Triton kernels compute: on a CUDA device if there is one and Triton compiles, else in its interpreter on the
CPU, with bfloat16 as cards have it.

numpy has no bfloat16: the interpreter keeps its bits as whole numbers, cuts fp32 off where a card rounds to the nearest even
number (cvt.rn.bf16.f32), and multiplies the bits in tl.dot. Both are put right for the length of a test.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest
import torch

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = torch.device("cuda" if COMPILED else "cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def bits_of(numbers: Any) -> Any:
    """fp32 to the bits of the nearest bfloat16."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def numbers_of(bits: Any) -> Any:
    """The bits of bfloat16 to fp32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def round_like_a_card(patch: pytest.MonkeyPatch) -> None:
    """Casts and products of bfloat16 in Triton's interpreter as a card computes them, until `patch` is undone."""
    if COMPILED:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        given, wanted = src.dtype.scalar, dst_type.scalar
        if given == tl.float32 and wanted == tl.bfloat16:
            return interpreter.TensorHandle(bits_of(src.data), wanted)
        if given == tl.bfloat16 and wanted == tl.float32:
            return interpreter.TensorHandle(numbers_of(src.data), wanted)
        return cast(self, src, dst_type)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(numbers_of(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return dot(self, widened(a), widened(b), *more)

    patch.setattr(builder, "cast_impl", cast_impl)
    for name in ("create_fp_trunc", "create_fp_ext"):
        patch.setattr(builder, name, cast_impl)
    patch.setattr(builder, "create_dot", create_dot)
