"""Weights in oneDNN's layout: the same products, and the weight again."""

from __future__ import annotations

import pytest
import torch

from lorakeet.kernels import onednn
from lorakeet.kernels.protocol import Situation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reordered_weight_multiplies_as_before(dtype: torch.dtype) -> None:
    if onednn.why_not(Situation(torch.device("cpu"), dtype, dtype)):
        pytest.skip("this processor cannot")
    weight, x = torch.randn(40, 24).to(dtype), torch.randn(3, 24).to(dtype)
    order = onednn.OneDnnOrder(weight)
    assert torch.equal(order.dense(), weight)
    torch.testing.assert_close(order.product(x), x @ weight.t(), rtol=0.02, atol=0.02)


def test_it_is_for_matrices_of_floating_numbers_on_a_cpu() -> None:
    assert onednn.takes(torch.ones(2, 3)) and not onednn.takes(torch.ones(2))
    assert onednn.why_not(Situation(torch.device("meta"), torch.float32, torch.float32)) == "it is a kernel for the CPU"
    assert "cannot reorder weights in int8" in onednn.why_not(Situation(torch.device("cpu"), torch.int8, torch.float32))
