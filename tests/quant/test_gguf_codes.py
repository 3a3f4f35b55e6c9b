"""GGUF's blocks by step, offset and code: every type put together again to the byte, and scales that fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.quant.gguf import BLOCK_TYPES, GgufBase
from lorakeet.quant.gguf_codes import HIGHEST, K_TYPES, fit_gguf_scales, inverted, nearest_codes, steps, with_codes


def weight(rows: int = 6, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def wide(base: GgufBase) -> tuple[Tensor, Tensor]:
    step, offset = steps(base)
    size = base.shape[1] // step.shape[1]
    return step.repeat_interleave(size, 1), offset.repeat_interleave(size, 1)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_any_codes_are_read_back_as_step_times_code_less_offset(kind: str) -> None:
    base = fit_gguf_scales(weight(), kind)
    codes = torch.randint(0, HIGHEST[kind] + 1, base.shape, generator=torch.Generator().manual_seed(1))
    step, offset = wide(base)
    changed = with_codes(base, codes.to(torch.uint8))
    torch.testing.assert_close(changed.dense(), step * codes - offset, rtol=1e-5, atol=1e-6)
    assert torch.equal(wide(changed)[0], step) and torch.equal(wide(changed)[1], offset)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_the_nearest_codes_of_what_a_block_means_are_its_own(kind: str) -> None:
    base = fit_gguf_scales(weight(), kind)
    step, offset = wide(base)
    codes = nearest_codes(base.dense(), inverted(step), offset, HIGHEST[kind])
    assert torch.equal(with_codes(base, codes.to(torch.uint8)).packed, base.packed)


@pytest.mark.parametrize("kind", K_TYPES)
def test_fitted_k_blocks_are_as_near_as_their_bits_allow(kind: str) -> None:
    """No number is off by more than about half a step, and gguf's own reader reads the same numbers."""
    import gguf

    exact = weight()
    exact[0] = exact[0].abs() + 0.1  # a range that does not hold 0 by itself
    exact[1] = 0
    base = fit_gguf_scales(exact, kind)
    off = (base.dense() - exact).abs()
    step, _ = wide(base)
    assert float((off - 0.5 * step.abs()).max()) < {"Q4_K": 6e-3, "Q5_K": 6e-3, "Q6_K": 1e-3}[kind]
    assert float(off[2:].norm() / exact[2:].norm()) < {"Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.03}[kind]
    assert bool((base.dense()[1] == 0).all())
    theirs = gguf.quants.dequantize(base.packed.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(theirs), base.dense())
