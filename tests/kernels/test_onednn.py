"""oneDNN's layout of dense weights: products and restored weights, and where it cannot be used."""

from __future__ import annotations

import pytest
import torch

from lorakeet.kernels.onednn import OneDnnOrder, takes, why_not
from lorakeet.kernels.protocol import Situation


@pytest.mark.parametrize("tokens", [1, 5])
def test_products_and_the_restored_weight_are_those_of_the_plain_weight(tokens: int) -> None:
    if reason := why_not(Situation(torch.device("cpu"), torch.float32, torch.float32)):
        pytest.skip(reason)
    weight, x = torch.randn(24, 40), torch.randn(tokens, 40)
    order = OneDnnOrder(weight)
    torch.testing.assert_close(order.product(x), x @ weight.t())
    assert torch.equal(order.dense(), weight)


def test_it_is_for_matrices_of_real_numbers_on_the_cpu() -> None:
    assert why_not(Situation(torch.device("cuda"), torch.float32, torch.float32)) == "it is a kernel for the CPU"
    assert "cannot reorder weights in int8" in why_not(Situation(torch.device("cpu"), torch.int8, torch.int8))
    assert takes(torch.zeros(2, 3)) and not takes(torch.zeros(3))
