"""A packed weight behind the four methods (W as bf16 for a packing), its settings, and the base of a module or weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakeet.core.base import DenseBase, TransposedBase
from lorakeet.core.scratch import SCRATCH
from lorakeet.quant import nf4
from lorakeet.quant.construct import base_of, empty_base, meta_base, quantise_weight, weights_in
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import NF4_BLOCK_SIZES, QuantSpec


class Narrow(PackedBase):
    """W rounded to bf16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        self.register_buffer("packed", weight.bfloat16())

    def unpack_by_torch(self, out: Tensor, first: int) -> Tensor:
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


def test_nothing_is_quantised_without_a_request() -> None:
    assert QuantSpec().method == "none" and QuantSpec().validate() == []


@pytest.mark.parametrize("size", [0, 48, 2048])
def test_a_block_size_that_is_none_is_refused_with_the_ones_that_are(size: int) -> None:
    (problem,) = QuantSpec(method="nf4", block_size=size).validate()
    assert str(size) in problem and "32, 64" in problem


def test_int8_products_are_for_weights_in_int8() -> None:
    assert QuantSpec(method="int8", int8_products=True).validate() == []
    assert QuantSpec(method="none", int8_products=True).validate() == []  # of a folder that is stored in int8
    (problem,) = QuantSpec(method="nf4", int8_products=True).validate()
    assert "nf4" in problem and "Set the method to int8" in problem


def test_settings_and_code_know_the_same_block_sizes() -> None:
    assert NF4_BLOCK_SIZES == nf4.BLOCK_SIZES


WEIGHT = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


def test_the_base_of_a_module() -> None:
    packed = PackedLinear(Int8Base.of(WEIGHT))
    assert base_of(packed, "linear") is packed.base
    assert type(base_of(nn.Linear(4, 3), "linear")) is DenseBase
    assert type(base_of(Conv1D(4, 3), "conv1d")) is TransposedBase


def test_packed_as_the_settings_ask() -> None:
    assert isinstance(quantise_weight(WEIGHT, QuantSpec(method="int8")), Int8Base)
    nf4 = quantise_weight(WEIGHT, QuantSpec(method="nf4", block_size=32, double_quant=False))
    assert isinstance(nf4, Nf4Base) and (nf4.block_size, nf4.double_quant) == (32, False)
    with pytest.raises(ValueError, match="'none'"):
        quantise_weight(WEIGHT, QuantSpec())


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_an_empty_base_is_like_the_one_described(method: str) -> None:
    base = quantise_weight(WEIGHT, QuantSpec(method=method))  # type: ignore[arg-type]
    empty = empty_base(base.settings, device="meta")
    described = {name: (buffer.shape, buffer.dtype) for name, buffer in base.named_buffers()}
    assert {name: (buffer.shape, buffer.dtype) for name, buffer in empty.named_buffers()} == described
    with pytest.raises(ValueError, match="int2"):
        empty_base({**base.settings, "method": "int2"})


def test_packed_weights_count_as_the_numbers_that_they_stand_for() -> None:
    model = nn.Sequential(nn.Linear(64, 6), PackedLinear(Nf4Base.of(WEIGHT), torch.zeros(6)))
    assert weights_in(model) == 2 * (6 * 64 + 6)


def test_without_numbers_a_base_still_says_how_it_is_packed() -> None:
    base = quantise_weight(WEIGHT, QuantSpec(method="nf4"))
    found = meta_base(base)
    assert found.settings == base.settings and all(buffer.is_meta for buffer in found.buffers())
