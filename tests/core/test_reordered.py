"""Weights in oneDNN's order: the same products, the same weight back, and what has no such order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakeet.core.reordered import ReorderedBase, ReorderedLinear, can_reorder

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_reorder(torch.zeros(4, 4, dtype=dtype))]


def test_there_is_an_order_on_this_machine() -> None:
    assert torch.float32 in DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_products_are_those_of_the_plain_weight(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    weight, x, grad = torch.randn(24, 33).to(dtype), torch.randn(tokens, 33).to(dtype), torch.randn(tokens, 24).to(dtype)
    base = ReorderedBase(weight)
    assert base.shape == (24, 33) and torch.equal(base.dense(), weight)
    near = {"rtol": 1e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(base.matmul(x), x @ weight.T, **near)
    torch.testing.assert_close(base.matmul_t(grad), grad @ weight, **near)
    assert base.matmul(x.double()).dtype == torch.float64, "a product in another dtype casts the weight"
    base.store(2 * weight)
    assert torch.equal(base.dense(), 2 * weight)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_replaced(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 7, bias=bias).requires_grad_(False)
    x = torch.randn(2, 3, 12)
    found = ReorderedLinear(linear)
    torch.testing.assert_close(found(x), linear(x))
    assert torch.equal(found.weight, linear.weight)
    grads = []
    for layer in (linear, found):
        given = x.clone().requires_grad_()
        layer(given).square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads)


def test_what_has_no_order() -> None:
    assert not can_reorder(torch.zeros(4, 4, device="meta"))
    assert not can_reorder(torch.zeros(4, 4, 4))
    assert not can_reorder(torch.zeros(4, 4, dtype=torch.int8))
