"""Every frozen base answers the same four questions, in the same orientation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakeet.core.base import DenseBase, FrozenBase, SliceBase, TransposedBase


def bases(dtype: torch.dtype = torch.float32) -> dict[str, tuple[FrozenBase, torch.Tensor, Any]]:
    """(base, W as (out, in), what to run for x·Wᵀ by torch's own code)."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(5, 7, bias=False, dtype=dtype), Conv1D(7, 5).to(dtype)
    stacked = nn.Parameter(torch.randn(3, 7, 5, dtype=dtype))
    nn.init.normal_(conv.weight)
    return {
        "linear": (DenseBase(linear), linear.weight.detach(), linear),
        "conv1d": (TransposedBase(conv), conv.weight.detach().t(), conv),
        "slice": (SliceBase(stacked, 1), stacked[1].detach(), lambda x: x @ stacked[1].t()),
    }


@pytest.mark.parametrize("name", bases())
def test_four_questions(name: str) -> None:
    base, weight, own = bases()[name]
    x, grad = torch.randn(4, 5), torch.randn(4, 7)
    assert base.shape == (7, 5)
    assert torch.equal(base.dense(), weight) and not base.dense().requires_grad
    assert torch.allclose(base.matmul(x), own(x), atol=1e-6)
    assert torch.allclose(base.matmul(x), x @ weight.T, atol=1e-6)
    assert torch.allclose(base.matmul_t(grad), grad @ weight, atol=1e-6)


@pytest.mark.parametrize("name", bases())
def test_store_writes_into_the_module(name: str) -> None:
    base, _, own = bases()[name]
    new, x = torch.randn(7, 5), torch.randn(4, 5)
    base.store(new)
    assert torch.equal(base.dense(), new)
    assert torch.allclose(own(x), x @ new.T, atol=1e-6)


def test_storing_an_expert_leaves_the_others() -> None:
    stacked = nn.Parameter(torch.randn(3, 7, 5))
    before = stacked.detach().clone()
    SliceBase(stacked, 1).store(torch.zeros(7, 5))
    assert torch.equal(stacked[0], before[0]) and torch.equal(stacked[2], before[2]) and not stacked[1].any()


@pytest.mark.parametrize("name", bases())
def test_products_take_the_dtype_of_x(name: str) -> None:
    base, weight, _ = bases(torch.bfloat16)[name]
    x, grad = torch.randn(4, 5), torch.randn(4, 7)
    assert torch.allclose(base.matmul(x), x @ weight.float().T, atol=1e-6)
    assert torch.allclose(base.matmul_t(grad), grad @ weight.float(), atol=1e-6)
    assert base.matmul(x.bfloat16()).dtype is base.matmul_t(grad.bfloat16()).dtype is torch.bfloat16


def test_a_cast_of_the_module_is_seen() -> None:
    module = nn.Linear(5, 7)
    base = DenseBase(module)
    module.to(torch.float64)
    assert base.dense().dtype is torch.float64
