"""Which products are chosen, and that the choice is one of the two that were compared."""

from __future__ import annotations

import pytest
import torch

from lorakeet.core import precision
from lorakeet.core.precision import fastest_products


def test_fp32_weights_are_multiplied_in_fp32() -> None:
    assert fastest_products(torch.float32) == torch.float32


def test_a_gpu_multiplies_what_is_stored() -> None:
    assert fastest_products(torch.bfloat16, "cuda") == torch.bfloat16


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("narrow", "wide", "wins"), [(1.0, 0.5, True), (1.0, 0.95, False), (0.5, 1.0, False)])
def test_fp32_is_chosen_only_where_it_is_clearly_faster(
    stored: torch.dtype, narrow: float, wide: float, wins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, products = 0.0, 0

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        nonlocal now, products
        products += 1
        now += wide if left.dtype == torch.float32 else narrow
        return left

    monkeypatch.setattr(precision.torch, "mm", product)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now)
    precision._measured.cache_clear()
    try:
        for _ in range(3):  # a process measures once: all of its models compute alike
            assert fastest_products(stored) == (torch.float32 if wins else stored)
            assert products == 2 * precision.PROBE_REPEATS
    finally:
        precision._measured.cache_clear()
