"""Where tests of Triton kernels compute: on a CUDA device if there is one and Triton compiles, else in its interpreter on the
CPU, with bfloat16 as cards have it.

numpy has no bfloat16: the interpreter keeps its bits as whole numbers, cuts fp32 off where a card rounds to the nearest even
number (cvt.rn.bf16.f32), and computes with the bits as they are. Both are put right for the length of a test. And it reads what
an address points to, whatever that is; here every address has to lie in a tensor that the kernel was given.
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


def interpret_without_a_card() -> None:
    """Where there is no CUDA device, this process and those that it starts run kernels in Triton's interpreter; on one they are
    compiled, unless TRITON_INTERPRET says otherwise. Triton reads it when it is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def bits_of(numbers: Any) -> Any:
    """fp32 to the bits of the nearest bfloat16."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def numbers_of(bits: Any) -> Any:
    """The bits of bfloat16 to fp32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def behave_like_a_card(patch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter rounds and multiplies bfloat16 as a card does, and refuses to touch memory beside what a kernel was
    given, until `patch` is undone."""
    if not COMPILED:
        _round(patch)
        _watch(patch)


def _watch(patch: pytest.MonkeyPatch) -> None:
    """Every address that is read or written lies in a tensor of the launch; floats are tensors of fp32, as in a launch."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder, launch, convert = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__, interpreter._implicit_cvt
    load, store = builder.create_masked_load, builder.create_masked_store
    given: list[tuple[int, int]] = []  # first and last address of each tensor

    def noted(value: Any) -> Any:
        if isinstance(value, float):  # which a launch makes fp32 of
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        if isinstance(value, torch.Tensor) and value.numel():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            given.append((value.data_ptr(), value.data_ptr() + last * value.element_size()))
        return convert(value)

    def called(self: Any, *arguments: Any, **options: Any) -> None:
        given.clear()
        launch(self, *arguments, **options)

    def check(pointers: Any, mask: Any, what: str) -> None:
        used = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))[
            np.broadcast_to(mask.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        ]
        inside = np.zeros(used.shape, dtype=bool)
        for first, last in given:
            inside |= (used >= first) & (used <= last)
        assert inside.all(), f"a kernel {what} {int((~inside).sum())} numbers outside of its tensors"

    def checked_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        check(pointers, mask, "reads")
        return load(self, pointers, mask, *more)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        check(pointers, mask, "writes")
        return store(self, pointers, value, mask, *more)

    patch.setattr(interpreter, "_implicit_cvt", noted)
    patch.setattr(interpreter.GridExecutor, "__call__", called)
    patch.setattr(builder, "create_masked_load", checked_load)
    patch.setattr(builder, "create_masked_store", checked_store)


def _round(patch: pytest.MonkeyPatch) -> None:
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

    binary = builder.binary_op

    def binary_op(self: Any, one: Any, other: Any, op: Any) -> Any:
        if not one.dtype.scalar == other.dtype.scalar == tl.bfloat16:
            return binary(self, one, other, op)
        found = op(numbers_of(one.data), numbers_of(other.data))
        return interpreter.TensorHandle(bits_of(found).reshape(found.shape), one.dtype.scalar)

    patch.setattr(builder, "binary_op", binary_op)
    patch.setattr(builder, "cast_impl", cast_impl)
    for name in ("create_fp_trunc", "create_fp_ext"):
        patch.setattr(builder, name, cast_impl)
    patch.setattr(builder, "create_dot", create_dot)
