"""Scales and zero points: what they cover, and how far the nearest value is away."""

from __future__ import annotations

import pytest
import torch

from lorakeet.quant.gptq_grid import codes_for, fit_group, groups_in_order, quantise_to_nearest


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_the_nearest_value_is_half_a_step_away_at_most(bits: int, sym: bool) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) + 0.3
    scale, zero = fit_group(weight, bits, sym)
    step, offset = scale.float()[:, None], zero.float()[:, None]
    found = (codes_for(weight, step, offset, bits) - offset) * step
    # The end of the range may be cut by half a step more, as zero is a whole number, and by the rounding of the scale to fp16.
    assert bool(((found - weight).abs() <= step * (1 + 2**bits * 2**-11)).all())
    inside = weight.abs() < step * (2 ** (bits - 1) - 1) if sym else torch.zeros_like(weight, dtype=torch.bool)
    assert bool(((found - weight).abs()[inside] <= 0.501 * step.expand_as(weight)[inside]).all())
    assert not sym or bool((zero == 2 ** (bits - 1)).all())


def test_a_group_of_zeros_stays_zero() -> None:
    codes, grid = quantise_to_nearest(torch.zeros(4, 8), 4, True, groups_in_order(8, 4), 2)
    assert torch.equal((codes.float() - grid.zeros[0, 0]) * grid.scales[0, 0], torch.zeros(4, 8))


def test_groups_may_be_in_any_order() -> None:
    weight = torch.tensor([[1.0, 100.0, 2.0, 200.0]])
    _, grid = quantise_to_nearest(weight, 8, False, torch.tensor([0, 1, 0, 1], dtype=torch.int32), 2)
    torch.testing.assert_close(grid.scales.float(), torch.tensor([[2 / 255], [200 / 255]]), rtol=1e-3, atol=0)
    assert groups_in_order(6, 2).tolist() == [0, 0, 1, 1, 2, 2] and groups_in_order(3, -1).tolist() == [0, 0, 0]
