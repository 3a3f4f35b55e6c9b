"""NF4 codes in whole blocks: their formula is that of the weight."""

from __future__ import annotations

import pytest
import torch

from lorakeet.quant.nf4 import Nf4Base, dequantise_blocks


@pytest.mark.parametrize("double", [False, True])
def test_the_formula_is_that_of_the_weight(double: bool) -> None:
    weight = torch.randn(40, 640, generator=torch.Generator().manual_seed(0))
    base = Nf4Base.of(weight, double_quant=double)
    codes = base.nf4_codes(0, 40)
    assert codes is not None and len(codes.absmax) == 400
    expected = dequantise_blocks(base.packed, base.block_maxima(0, 400), 64).view(400, 64)
    assert torch.equal(codes.by_formula(), expected)


def test_weights_without_whole_blocks_have_none() -> None:
    base = Nf4Base.of(torch.ones(3, 70))
    assert base.nf4_codes(0, 3) is None and base.nf4_codes(1, 1) is None
