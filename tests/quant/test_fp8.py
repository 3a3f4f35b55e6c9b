"""FP8: the numbers of torch's own float8 times the scale of their block, rounded once; parts and tiles change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.quant.construct import empty_base
from lorakeet.quant.fp8 import Block, Fp8Base, scale_shape

SHAPE = (37, 50)  # no whole number of blocks


def filled(block: Block) -> Fp8Base:
    base = Fp8Base(SHAPE, block)
    base.store(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    return base


def by_hand(base: Fp8Base) -> torch.Tensor:
    numbers = base.packed.view(torch.float8_e4m3fn).float()
    for row in range(SHAPE[0]):
        for column in range(SHAPE[1]):
            numbers[row, column] *= base.scale[row // base.block[0], column // base.block[1]]
    return numbers


@pytest.mark.parametrize("block", [(16, 32), (1, 50), SHAPE, (128, 128)])
def test_each_number_has_the_scale_of_its_block(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    base = filled(block)
    assert tuple(base.scale.shape) == scale_shape(SHAPE, block)
    assert torch.equal(base.dense(), by_hand(base))
    monkeypatch.setattr("lorakeet.quant.packed.TILE", 100)
    assert torch.equal(base.dense(), by_hand(base))
    assert torch.equal(base.unpack(torch.empty(9, 50), 11), by_hand(base)[11:20])
    assert torch.equal(base.unpack(torch.empty(SHAPE, dtype=torch.bfloat16)), by_hand(base).bfloat16())


def test_what_is_stored_is_off_by_a_sixteenth_at_most() -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    base = filled((16, 32))
    ordinary = weight.abs() > 2**-6 * 448 * base.scale.max()  # above float8's smallest exponent
    assert bool(((base.dense() - weight).abs() <= weight.abs() / 16 * 1.001)[ordinary].all()) and ordinary.float().mean() > 0.5


def test_buffers_go_through_safetensors_and_products_are_those_of_the_dense_matrix(tmp_path: Path) -> None:
    base = filled((16, 32))
    save_file(dict(base.named_buffers()), tmp_path / "base.safetensors")
    again = empty_base(base.settings)
    again.load_state_dict(load_file(tmp_path / "base.safetensors"))
    assert again.bytes == 37 * 50 + 4 * 3 * 2
    x, grad = torch.randn(5, 50), torch.randn(5, 37)
    torch.testing.assert_close(again.matmul(x), x @ base.dense().T)
    torch.testing.assert_close(again.matmul_t(grad), grad @ base.dense())


def test_a_weight_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the weight is \(2, 3\), but this base is \(37, 50\)"):
        filled((1, 50)).store(torch.zeros(2, 3))
