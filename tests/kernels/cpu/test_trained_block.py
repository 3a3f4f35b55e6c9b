"""What C is told of a block's pairs. What it computes: tests/core/fused/test_trained_block.py."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from lorakeet.kernels.cpu.trained_block import GROUPS, LAYERS, Pairs
from tiny.native import needs_native

pytestmark = needs_native


def test_gradients_come_back_in_the_order_of_the_factors() -> None:
    shapes = [(64, 32), (32, 32), (32, 32), (32, 64), (96, 32), (96, 32), (32, 96)]
    factors = [factor for _ in range(2) for out, width in shapes for factor in (torch.zeros(3, width), torch.zeros(out, 3))]
    pairs = Pairs(factors, [(0, 4), (4, 9)], [1.0] * 2 * LAYERS, 9)
    of_a, of_b = pairs.gradients()
    assert [of_a.numel(), of_b.numel()] == [sum(factor.numel() for factor in factors[first::2]) for first in (0, 1)]
    cut = pairs.cut((of_a, of_b))
    assert [each.shape for each in cut] == [factor.shape for factor in factors]
    for which, whole in enumerate((of_a, of_b)):
        order = [2 * (LAYERS * place + layer) + which for group in GROUPS for place in range(2) for layer in group]
        starts = [cut[number].storage_offset() for number in order]
        assert starts == [0, *accumulate(cut[number].numel() for number in order[:-1])], "group by group, place by place"
        assert all(cut[number].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for number in order)
    with pytest.raises(ValueError, match="must have rows, and share none"):
        Pairs(factors, [(0, 4), (3, 9)], [1.0] * 2 * LAYERS, 9)
