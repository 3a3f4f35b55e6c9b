"""Rows picked from tables: dot products and weighted sums equal the products of single rows, whichever way they are computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.core.batched import gathered
from lorakeet.core.batched.gathered import row_dots, row_sums
from lorakeet.kernels.device import standing_for

ROWS, WIDTH = 7, 200
TOKENS = torch.tensor([0, 0, 2, 2, 2, 1])
PICKED = torch.tensor([6, 0, 3, 3, 1, 5])


def numbers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_dots(dtype: torch.dtype) -> None:
    x, table = numbers(3, WIDTH, seed=0, dtype=dtype), numbers(ROWS, WIDTH, seed=1, dtype=dtype)
    expected = (x[TOKENS].double() * table[PICKED].double()).sum(1).to(dtype)
    found = [row_dots(x, TOKENS, table, PICKED)]
    with standing_for(torch.device("cuda")):
        found.append(row_dots(x, TOKENS, table, PICKED))
    for one in found:
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_sums(dtype: torch.dtype) -> None:
    weights, table = numbers(len(PICKED), seed=2, dtype=dtype), numbers(ROWS, WIDTH, seed=3, dtype=dtype)
    firsts = torch.tensor([0, 2, 2, 5])  # the second has nothing to add up
    parts = [slice(0, 2), slice(2, 2), slice(2, 5), slice(5, 6)]
    each = weights[:, None].double() * table[PICKED].double()
    expected = torch.stack([each[part].sum(0) for part in parts]).to(dtype)
    found = row_sums(weights, table, PICKED, firsts)
    torch.testing.assert_close(found, expected)
    assert not found[1].count_nonzero()


def test_a_kernel_that_rounds_each_sum_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gathered._adds_up_well(torch.float32)

    def rounding(x: Tensor, table: Tensor, rows: Tensor, _: Tensor, tokens: Tensor, __: int) -> Tensor:
        return (x[tokens] * table[rows]).cumsum(1)[:, -1]  # as wide as its numbers

    class Ops:
        _embedding_bag_per_sample_weights_backward = staticmethod(rounding)

    gathered._adds_up_well.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(torch.ops, "aten", Ops)
            assert gathered._adds_up_well(torch.float32)
            Ops._embedding_bag_per_sample_weights_backward = staticmethod(  # type: ignore[method-assign]
                lambda x, table, rows, _, tokens, __: _one_by_one(x[tokens] * table[rows])
            )
            gathered._adds_up_well.cache_clear()
            assert not gathered._adds_up_well(torch.bfloat16)
    finally:
        gathered._adds_up_well.cache_clear()


def _one_by_one(products: Tensor) -> Tensor:
    """Sums that are rounded to the dtype of the products after each number."""
    total = products[:, 0].clone()
    for column in products.unbind(1)[1:]:
        total += column
    return total
