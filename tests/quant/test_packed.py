"""A packed weight behind the four methods, shown with the simplest packing there is: W as bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.core.scratch import SCRATCH
from lorakeet.quant.packed import PackedBase, PackedLinear


class Narrow(PackedBase):
    """W rounded to bf16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        self.register_buffer("packed", weight.bfloat16())

    def unpack(self, out: Tensor, first: int = 0) -> Tensor:
        return out.copy_(self.get_buffer("packed")[first : first + len(out)])

    def store(self, weight: Tensor) -> None:
        self.get_buffer("packed").copy_(weight)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).bfloat16().float()


def test_products_are_those_of_the_dense_weight(weight: Tensor) -> None:
    base = Narrow(weight)
    x, g = torch.randn(4, 10), torch.randn(4, 6)
    assert torch.equal(base.matmul(x), x @ weight.T)
    assert torch.equal(base.matmul_t(g), g @ weight)
    assert torch.equal(base.dense(), weight)
    assert base.bytes == weight.numel() * 2


def test_in_fp32_some_rows_at_a_time_give_the_same_products(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    base, x, g = Narrow(weight), torch.randn(4, 10), torch.randn(4, 6)
    monkeypatch.setattr("lorakeet.quant.packed.PART_BYTES", 4 * 10 * 4)  # four rows of fp32
    SCRATCH.clear()
    torch.testing.assert_close(base.matmul(x), x @ weight.T)
    torch.testing.assert_close(base.matmul_t(g), g @ weight)
    assert [buffer.numel() for buffer in SCRATCH._buffers.values()] == [40]
    narrow = base.matmul(x.bfloat16())
    assert max(buffer.numel() for buffer in SCRATCH._buffers.values()) == 60 and narrow.dtype == torch.bfloat16


def test_gradients_reach_the_input(weight: Tensor) -> None:
    bias = torch.randn(6)
    layer = PackedLinear(Narrow(weight), bias)
    x = torch.randn(2, 3, 10, requires_grad=True)
    layer(x).square().sum().backward()
    found, x.grad = x.grad, None
    (x @ weight.T + bias).square().sum().backward()
    torch.testing.assert_close(found, x.grad)
    assert (layer.in_features, layer.out_features) == (10, 6)


def test_scratch_holds_one_matrix_however_many_bases_use_it(weight: Tensor) -> None:
    SCRATCH.clear()
    bases = [Narrow(weight), Narrow(weight[:3])]
    for base in bases:
        base.matmul(torch.randn(2, 10))
    assert [buffer.numel() for buffer in SCRATCH._buffers.values()] == [60]
    dense = bases[0].dense()
    bases[1].matmul(torch.randn(2, 10))
    assert torch.equal(dense, weight), "a matrix handed out by dense() is the caller's own"


def test_a_packing_must_say_how(weight: Tensor) -> None:
    with pytest.raises(NotImplementedError, match="unpacked"):
        PackedBase((2, 2)).unpack(weight)
    with pytest.raises(NotImplementedError, match="packed"):
        PackedBase((2, 2)).store(weight)
    with pytest.raises(NotImplementedError, match="mean"):
        _ = PackedBase((2, 2)).settings


def test_a_layer_shows_its_weight_as_the_module_that_it_stands_for(weight: Tensor) -> None:
    assert torch.equal(PackedLinear(Narrow(weight)).weight, weight)
    assert torch.equal(PackedLinear(Narrow(weight), transposed=True).weight, weight.t())


def test_products_run_in_the_dtype_that_is_set(weight: Tensor) -> None:
    layer, x = PackedLinear(Narrow(weight)), torch.randn(4, 10).bfloat16()
    layer.products = torch.float32
    assert torch.equal(layer(x), (x.float() @ weight.T).bfloat16())
