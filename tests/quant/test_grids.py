"""Grids of packed weights: what is on one stays where it is, what is not goes to the nearest value, and layouts are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorakeet.quant import gguf_codes
from lorakeet.quant.gptq import GptqBase, quantise_to_nearest
from lorakeet.quant.grids import grid_of, requantise_like
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase


def weight(seed: int = 0) -> Tensor:
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)) * 0.05


def gptq(exact: Tensor, *, sym: bool) -> GptqBase:
    """Groups of 64 whose columns lie in a random order, as with desc_act."""
    g_idx = (torch.randperm(256, generator=torch.Generator().manual_seed(5)) // 64).to(torch.int32)
    codes, grid = quantise_to_nearest(exact, 4, sym, g_idx, 4)
    return GptqBase.of(codes, grid, bits=4, sym=sym, zero_format="gptq" if sym else "gptq_v2")


BASES: dict[str, Callable[[Tensor], PackedBase]] = {
    "gptq": lambda exact: gptq(exact, sym=True),
    "gptq asymmetric": lambda exact: gptq(exact, sym=False),
    "nf4": Nf4Base.of,
    "nf4 in blocks over rows": lambda exact: Nf4Base.of(exact[:, :-16], block_size=128, double_quant=False),
    "Q4_0": lambda exact: gguf_codes.fit_gguf_scales(exact, "Q4_0"),
    "Q4_K": lambda exact: gguf_codes.fit_gguf_scales(exact, "Q4_K"),
    "Q6_K": lambda exact: gguf_codes.fit_gguf_scales(exact, "Q6_K"),
}


@pytest.mark.parametrize("name", BASES)
def test_what_is_on_the_grid_is_packed_to_the_same_bytes(name: str) -> None:
    base = BASES[name](weight())
    again = grid_of(base).nearest(base.dense())
    assert again.settings == base.settings
    assert all(torch.equal(again.get_buffer(part), buffer) for part, buffer in base.named_buffers())


@pytest.mark.parametrize("name", BASES)
def test_values_columns_and_packed_weight_agree(name: str) -> None:
    base = BASES[name](weight())
    other = weight(1)[:, : base.shape[1]]
    grid = grid_of(base)
    values = grid.values(other)
    torch.testing.assert_close(grid.nearest(other).dense(), values, rtol=1e-5, atol=1e-7)
    pairs = [grid.column(other[:, at], at) for at in range(base.shape[1])]
    torch.testing.assert_close(torch.stack([value for _, value in pairs], 1), values)
    codes = torch.stack([code for code, _ in pairs], 1).to(torch.uint8)
    torch.testing.assert_close(grid.filled(codes).dense(), values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", BASES)
def test_no_other_value_of_the_grid_is_nearer(name: str) -> None:
    base = BASES[name](weight())
    other = weight(1)[:, : base.shape[1]]
    grid = grid_of(base)
    off = (grid.values(other) - other).abs()
    for code in range(64 if name == "Q6_K" else 16):
        there = grid.filled(torch.full(base.shape, code, dtype=torch.uint8)).dense()
        assert bool((off <= (there - other).abs() + 1e-6).all())


@pytest.mark.parametrize("name", BASES)
def test_a_fitted_weight_has_the_layout_of_its_model(name: str) -> None:
    base = BASES[name](weight())
    other = 3 * weight(1)[:, : base.shape[1]]
    found = requantise_like(base, other)
    assert found.settings == base.settings
    assert float((found.dense() - other).norm()) < 0.7 * float((grid_of(base).values(other) - other).norm())
    if isinstance(base, GptqBase) and isinstance(found, GptqBase):
        assert torch.equal(found.g_idx, base.g_idx)


def test_other_bases_are_refused() -> None:
    for call in (grid_of, lambda base: requantise_like(base, weight())):
        with pytest.raises(ValueError, match="Int8Base has no grid here"):
            call(Int8Base.of(weight()))
