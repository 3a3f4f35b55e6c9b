"""Kernels are loaded by the name of their module, once; every source of the table exists and offers what its task needs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from lorakeet.kernels import flash_varlen
from lorakeet.kernels.choose import TABLE, TORCH
from lorakeet.kernels.cpu import attention, elementwise, trained_pairs
from lorakeet.kernels.protocol import (
    DecodeBlocks,
    DenseProducts,
    Dequantiser,
    ElementwiseOps,
    InferencePairs,
    Int8Products,
    Kernel,
    LowRankProducts,
    PackedAttention,
    QuantisedProducts,
    TrainedBlocks,
)

TASKS: dict[str, Any] = {
    "decoder block, training": TrainedBlocks,
    "decoder block, generation": DecodeBlocks,
    "elementwise ops": ElementwiseOps,
    "product, dense weight": DenseProducts,
    "product, quantised weight": QuantisedProducts,
    "product in int8": Int8Products,
    "dequantise": Dequantiser,
    "low-rank pairs, training": LowRankProducts,
    "low-rank pairs, inference": InferencePairs,
}


@pytest.mark.parametrize("kernel", [kernel for kernels in TABLE.values() for kernel in kernels], ids=lambda kernel: kernel.name)
def test_every_source_can_be_loaded(kernel: Kernel) -> None:
    assert (kernel.offers is None) == (not kernel.source) and kernel.offers is kernel.offers
    assert bool(kernel.needs) == (kernel.takes is not None)


@pytest.mark.parametrize(("task", "protocol"), TASKS.items())
def test_kernels_offer_the_functions_of_their_task(task: str, protocol: Any) -> None:
    for kernel in TABLE[task]:
        if kernel.source:
            names = {*inspect.get_annotations(protocol), *(name for name in vars(protocol) if not name.startswith("_"))}
            assert names and all(hasattr(kernel.offers, name) for name in names)


def test_attention_kernels_have_both_passes() -> None:
    for kernel in (attention.RowAttention, flash_varlen.FlashVarlen):
        assert all(callable(getattr(kernel, name)) for name in ("forward", "backward") if hasattr(PackedAttention, name))


def test_a_source_is_a_module_or_a_name_in_it() -> None:
    assert TORCH.offers is None
    assert Kernel("a", TORCH.why_not, source="lorakeet.kernels.cpu.elementwise").offers is elementwise
    assert Kernel("b", TORCH.why_not, source="lorakeet.kernels.cpu.trained_pairs:takes").offers is trained_pairs.takes
