"""Weights in the order of a product: the same products, the same weight back, and what has no such order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakeet.core.base import DenseBase
from lorakeet.core.reordered import ReorderedBase, ReorderedLinear, ReorderedProducts, can_reorder
from lorakeet.kernels.cpu.panels import Panels
from tiny.native import needs_native

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_reorder(torch.zeros(4, 4, dtype=dtype))]


def test_there_is_an_order_on_this_machine() -> None:
    assert torch.float32 in DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("width", [33, 34])  # Lorakeet's own order takes even widths
def test_products_are_those_of_the_plain_weight(dtype: torch.dtype, tokens: int, width: int) -> None:
    torch.manual_seed(0)
    weight, x, grad = torch.randn(24, width).to(dtype), torch.randn(tokens, width).to(dtype), torch.randn(tokens, 24).to(dtype)
    base = ReorderedBase(weight)
    assert base.shape == (24, width) and torch.equal(base.dense(), weight)
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


@needs_native
def test_weights_of_one_input_are_one_product() -> None:
    torch.manual_seed(0)
    bases = [ReorderedBase(torch.randn(out, 32).bfloat16()) for out in (24, 7)]
    together, x = ReorderedProducts(bases), torch.randn(5, 32).bfloat16()
    assert all(isinstance(base.order, Panels) for base in bases)

    def check() -> None:
        found = together(x)
        assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()
        for ours, base in zip(found, bases, strict=True):
            assert torch.equal(ours, base.matmul(x))

    check()
    bases[1].store(torch.randn(7, 32).bfloat16())  # which is noticed
    check()
    plain = DenseBase(nn.Linear(32, 3, bias=False).bfloat16())
    apart = ReorderedProducts([bases[0], plain])(x)
    assert torch.equal(apart[0], bases[0].matmul(x)) and torch.equal(apart[1], plain.matmul(x))


def test_what_has_no_order() -> None:
    assert not can_reorder(torch.zeros(4, 4, device="meta"))
    assert not can_reorder(torch.zeros(4, 4, 4))
    assert not can_reorder(torch.zeros(4, 4, dtype=torch.int8))
