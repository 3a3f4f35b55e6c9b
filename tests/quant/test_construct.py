"""From module or weight to base: packed where it is packed, dense where it is dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakeet.core.base import DenseBase, TransposedBase
from lorakeet.quant.construct import base_of, empty_base, meta_base, quantise_weight, weights_in
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.spec import QuantSpec

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
