"""Kernels are loaded by the name of their module, once; every source of the table exists and offers what its task needs."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import pytest

from lorakeet.kernels import flash_varlen
from lorakeet.kernels.choose import TABLE, TORCH
from lorakeet.kernels.cpu import attention, elementwise, trained_pairs
from lorakeet.kernels.protocol import DenseProducts, ElementwiseOps, Kernel, LowRankProducts, PackedAttention

TASKS = {"elementwise ops": ElementwiseOps, "product, dense weight": DenseProducts, "low-rank pairs, training": LowRankProducts}


@pytest.mark.parametrize("kernel", [kernel for kernels in TABLE.values() for kernel in kernels], ids=lambda kernel: kernel.name)
def test_every_source_can_be_loaded(kernel: Kernel) -> None:
    if ".triton." in kernel.source and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    assert (kernel.load() is None) == (not kernel.source) and kernel.load() is kernel.load()
    assert bool(kernel.needs) == (kernel.takes is not None or "trained_block" in kernel.source)


@pytest.mark.parametrize(("task", "protocol"), TASKS.items())
def test_kernels_offer_the_functions_of_their_task(task: str, protocol: Any) -> None:
    for kernel in TABLE[task]:
        if kernel.source and not (".triton." in kernel.source and importlib.util.find_spec("triton") is None):
            assert all(hasattr(kernel.load(), name) for name in inspect.get_annotations(protocol))


def test_attention_kernels_have_both_passes() -> None:
    for kernel in (attention.NativeRows, flash_varlen.FlashVarlen):
        assert all(callable(getattr(kernel, name)) for name in ("forward", "backward") if hasattr(PackedAttention, name))


def test_a_source_is_a_module_or_a_name_in_it() -> None:
    assert TORCH.load() is None
    assert Kernel("a", TORCH.why_not, source="lorakeet.kernels.cpu.elementwise").load() is elementwise
    assert Kernel("b", TORCH.why_not, source="lorakeet.kernels.cpu.trained_pairs:takes").load() is trained_pairs.takes
