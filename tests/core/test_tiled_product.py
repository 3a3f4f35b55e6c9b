"""Products by tiles of rows: the plain product, its gradient, and the same bits wherever the rows come from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.core.tiled_product import TILE, back_product, tiled_product, tiles


class Counting:
    """Rows that are handed out in parts, and how often."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.calls = weight, 0

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def __getitem__(self, part: slice) -> Tensor:
        self.calls += 1
        return self.weight[part].clone()


def test_tiles_lie_end_to_end_and_the_last_is_shorter() -> None:
    assert list(tiles(10, 4)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert list(tiles(0, 4)) == []


@pytest.mark.parametrize("rows", [5, TILE + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_whole_matrix(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, 6, generator=generator).to(dtype)
    x = torch.randn(3, 6, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(3, rows, generator=generator).to(dtype)
    y = tiled_product(x, weight)
    y.backward(grad)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    expected = grad.double() @ weight.double()
    assert torch.allclose(y.double(), x.detach().double() @ weight.double().t(), rtol=tolerance, atol=tolerance * 4)
    assert x.grad is not None and x.grad.dtype == dtype
    assert torch.allclose(x.grad.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_rows_that_come_in_parts_give_the_same_bits() -> None:
    weight, x = torch.randn(2 * TILE + 1, 5), torch.randn(4, 5)
    parts = Counting(weight)
    assert torch.equal(tiled_product(x, parts), tiled_product(x, weight)) and parts.calls == 3
    grad = torch.randn(4, 2 * TILE + 1)
    assert torch.equal(back_product(grad, parts, torch.float32), back_product(grad, weight, torch.float32))
