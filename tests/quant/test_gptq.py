"""GPTQ's four tensors as a frozen base, against the formula written out number by number."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lorakeet.quant import packed
from lorakeet.quant.construct import empty_base
from lorakeet.quant.gptq import GptqBase, gptq_buffer_shapes
from lorakeet.quant.gptq_grid import GptqGrid, groups_in_order
from lorakeet.quant.gptq_pack import ZeroFormat

OUT, IN, GROUPS = 64, 96, 3


def parts(bits: int, *, in_order: bool = False) -> tuple[Tensor, GptqGrid]:
    chance = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (OUT, IN), generator=chance, dtype=torch.uint8)
    scales = (torch.rand(GROUPS, OUT, generator=chance) + 0.1).half()
    zeros = torch.randint(0, 2**bits, (GROUPS, OUT), generator=chance, dtype=torch.uint8)
    g_idx = torch.randint(0, GROUPS, (IN,), generator=chance, dtype=torch.int32)
    return codes, GptqGrid(scales, zeros, groups_in_order(IN, IN // GROUPS) if in_order else g_idx)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(("bits", "zero_format"), list(itertools.product((2, 3, 4, 8), ("gptq", "gptq_v2"))))
def test_dense_is_the_formula(bits: int, zero_format: ZeroFormat, in_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, grid = parts(bits, in_order=in_order)
    base = GptqBase.of(codes, grid, bits=bits, sym=False, zero_format=zero_format)
    expected = torch.empty(OUT, IN)
    for row, column in itertools.product(range(OUT), range(IN)):
        group = int(grid.g_idx[column])
        expected[row, column] = float(grid.scales[group, row]) * (int(codes[row, column]) - int(grid.zeros[group, row]))
    assert torch.equal(base.dense(), expected)
    monkeypatch.setattr(packed, "TILE", IN * 32)  # two tiles
    assert torch.equal(base.dense(), expected)
    assert torch.equal(base.unpack(torch.empty(OUT, IN, dtype=torch.bfloat16)), expected.bfloat16())
    assert torch.equal(base.grid.zeros, grid.zeros)


@pytest.mark.parametrize("sym", [True, False])
def test_store_rounds_to_the_nearest_in_the_groups_of_now(sym: bool) -> None:
    codes, grid = parts(4)
    base = GptqBase.of(codes, grid, bits=4, sym=sym)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    base.store(weight)
    step = base.scales.float()[grid.g_idx].t()
    assert torch.equal(base.g_idx, grid.g_idx) and bool(((base.dense() - weight).abs() <= step * 1.01).all())
    assert float((base.dense() - weight).norm() / weight.norm()) < 0.13
    with pytest.raises(ValueError, match="the weight is"):
        base.store(weight.t())


def test_an_empty_base_takes_over_the_numbers() -> None:
    codes, grid = parts(3)
    base = GptqBase.of(codes, grid, bits=3, sym=False, zero_format="gptq_v2")
    again = empty_base(base.settings)
    again.load_state_dict(base.state_dict())
    assert torch.equal(again.dense(), base.dense())
    assert base.bytes == OUT * IN * 3 // 8 + GROUPS * OUT * (3 / 8 + 2) + IN * 4


def test_shapes_that_do_not_fit_the_format_are_refused() -> None:
    with pytest.raises(ValueError, match="bits is 5; expected one of 2, 3, 4, 8"):
        gptq_buffer_shapes((32, 32), bits=5, groups=1)
    with pytest.raises(ValueError, match="30×32 does not fill whole words"):
        gptq_buffer_shapes((30, 32), bits=4, groups=1)
