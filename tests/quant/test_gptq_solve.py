"""GPTQ's algorithm: errors of outputs against round-to-nearest, and each column's move against a direct solution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakeet.core.scratch import SCRATCH
from lorakeet.errors import DataError
from lorakeet.memory.spill import Spill
from lorakeet.quant import gptq_pack, gptq_solve
from lorakeet.quant.gptq_grid import groups_in_order, quantise_to_nearest
from lorakeet.quant.gptq_solve import GptqLayout, Hessian, bytes_of_solving, gptq_quantise, output_error, sensitivity
from lorakeet.quant.packed import TILE
from tiny.held import HeldBytes

OUT, IN, GROUP = 64, 256, 64


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Correlated, of uneven strength, as the inputs of a layer are."""
    chance = torch.Generator().manual_seed(0)
    mixed = torch.randn(2048, 48, generator=chance) @ torch.randn(48, IN, generator=chance)
    return (mixed + torch.randn(2048, IN, generator=chance)) * torch.rand(IN, generator=chance)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)) * 0.05


def hessian_of(x: Tensor) -> Tensor:
    hessian = Hessian(IN)
    for part in x.split(500):  # type: ignore[no-untyped-call]
        hessian.add(part[None])
    return hessian.matrix


def error(x: Tensor, weight: Tensor, other: Tensor) -> float:
    return float((x @ (weight - other).T).norm() / (x @ weight.T).norm())


def test_the_hessian_is_the_mean_over_all_tokens(inputs: Tensor) -> None:
    torch.testing.assert_close(hessian_of(inputs), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_outputs_move_far_less_than_with_rounding_to_the_nearest(
    bits: int, sym: bool, desc_act: bool, inputs: Tensor, weight: Tensor
) -> None:
    base = gptq_quantise(weight, sensitivity(hessian_of(inputs)), GptqLayout(bits, GROUP, desc_act, sym))
    nearest = base.dense()
    base_error = error(inputs, weight, nearest)
    base.g_idx.copy_(groups_in_order(IN, GROUP))
    base.store(weight)
    assert base_error < 0.5 * error(inputs, weight, base.dense())


def test_one_column_of_two_is_moved_to_make_up_for_the_other() -> None:
    """With two inputs, what is left of the first column's error is the least that a change of the second can leave."""
    chance = torch.Generator().manual_seed(3)
    x = torch.randn(400, 2, generator=chance) @ torch.tensor([[2.0, 0.9], [0.0, 0.8]])
    weight = torch.randn(8, 2, generator=chance)
    hessian = x.T @ x / len(x)
    found = sensitivity(hessian, damping=1e-7)
    first, second = found.order.tolist()
    assert hessian[first, first] >= hessian[second, second]
    lost = 0.1
    best = lost * hessian[first, second] / hessian[second, second]  # argmin over d of ‖x·(lost, −d)‖
    moved = lost / found.factor[0, 0] * found.factor[0, 1]
    torch.testing.assert_close(-moved, best, rtol=1e-3, atol=1e-4)
    assert weight.shape == (8, 2)


def test_a_grid_that_is_given_is_kept(inputs: Tensor, weight: Tensor) -> None:
    codes, grid = quantise_to_nearest(weight, 4, True, torch.arange(IN, dtype=torch.int32) % 4, 4)
    base = gptq_quantise(weight * 1.01, sensitivity(hessian_of(inputs)), GptqLayout(4, GROUP), grid=grid)
    for name in ("scales", "zeros", "g_idx"):
        assert torch.equal(getattr(base.grid, name), getattr(grid, name))
    steps = grid.scales.float()[grid.g_idx.long()].T
    nearest = (codes.float() - 8) * steps
    assert error(inputs, weight * 1.01, base.dense()) < 0.5 * error(inputs, weight * 1.01, nearest)


def test_inputs_that_are_always_0_are_rounded_to_the_nearest(inputs: Tensor, weight: Tensor) -> None:
    dead = inputs.clone()
    dead[:, 5] = 0
    base = gptq_quantise(weight, sensitivity(hessian_of(dead)), GptqLayout(8, -1))
    step = base.scales.float()[0]
    assert bool(((base.dense() - weight)[:, 5].abs() <= 0.51 * step).all())


def test_one_token_is_enough_with_damping_and_inputs_that_are_not_finite_are_refused(inputs: Tensor, weight: Tensor) -> None:
    single = hessian_of(inputs[:1])
    assert bool(torch.isfinite(gptq_quantise(weight, sensitivity(single), GptqLayout(4, GROUP)).dense()).all())
    broken = inputs.clone()
    broken[7, 3] = float("inf")
    with pytest.raises(DataError, match="not finite"):
        sensitivity(hessian_of(broken))


@pytest.mark.parametrize(
    "layout", [GptqLayout(4, 128), GptqLayout(8, 32, True), GptqLayout(3, -1), GptqLayout(4, -1, True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(768, 256), (2816, 512)])
@pytest.mark.parametrize("tile", [TILE, 1 << 10])
def test_what_is_held_is_what_is_planned(
    layout: GptqLayout, dtype: torch.dtype, shape: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more, and not half as much again; with small tiles, as in a large weight, packing the codes is not the peak."""
    for module in (gptq_pack, gptq_solve):
        monkeypatch.setattr(module, "TILE", tile)
    hessian = Hessian(shape[1])
    hessian.add(torch.randn(2 * shape[1], shape[1], generator=torch.Generator().manual_seed(0)))
    weight, inputs = torch.randn(shape).to(dtype), sensitivity(hessian.matrix)
    with HeldBytes() as held:
        gptq_quantise(weight, inputs, layout)
    assert held.peak <= bytes_of_solving(shape, layout, dtype) <= 1.5 * held.peak


def test_one_matrix_stands_beside_the_hessian(inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_solve, "ROWS", 16)
    hessian = hessian_of(inputs)
    with HeldBytes() as held:
        sensitivity(hessian)
    assert held.peak < 1.3 * hessian.nbytes


def test_the_factor_is_that_of_the_inverse_in_the_order_of_the_columns(inputs: Tensor) -> None:
    hessian = hessian_of(inputs)
    found = sensitivity(hessian, damping=0.02)
    damped = hessian[found.order][:, found.order].double()
    damped += 0.02 * hessian.diagonal().double().mean() * torch.eye(IN)
    factor = found.factor.double()
    assert torch.equal(factor, factor.triu()) and bool((factor.diagonal() > 0).all())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(IN, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rows", [16, 100, 512])
def test_where_the_hessian_lies_changes_no_bit(
    rows: int, inputs: Tensor, weight: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq_solve, "ROWS", rows)
    hessian, spill = hessian_of(inputs), Spill(tmp_path)
    spill.put("H", hessian)
    stored = spill.rows("H")
    assert stored.shape == hessian.shape and stored.dtype == hessian.dtype and torch.equal(stored[7:60], hessian[7:60])
    one, other = sensitivity(hessian), sensitivity(stored)
    assert torch.equal(one.order, other.order) and torch.equal(one.factor, other.factor)
    base = gptq_quantise(weight, one, GptqLayout(4, GROUP))
    assert output_error(weight, base, hessian) == output_error(weight, base, stored)
    spill.close()


def test_outputs_are_compared_a_part_at_a_time(inputs: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, weight = hessian_of(inputs), weight.repeat(16, 1)
    base = gptq_quantise(weight, sensitivity(hessian), GptqLayout(4, 16))
    found, change = output_error(weight, base, hessian), weight - base.dense()
    exact = (change.double() @ hessian.double() * change).sum() / (weight.double() @ hessian.double() * weight).sum()
    assert found == pytest.approx(float(exact) ** 0.5, rel=1e-4)
    monkeypatch.setattr("lorakeet.quant.packed.PART_BYTES", weight.nbytes // 16)
    SCRATCH.clear()
    with HeldBytes() as held:
        parts = output_error(weight, base, hessian)
    assert parts == pytest.approx(found, rel=1e-5) and held.peak < 0.4 * weight.nbytes
