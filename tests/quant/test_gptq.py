"""GPTQ: the grid, codes in words, the solver, the settings of checkpoints, and its four tensors as a frozen base."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.core.scratch import SCRATCH
from lorakeet.errors import ConfigError, DataError
from lorakeet.memory.spill import Spill
from lorakeet.quant import gptq, gptq_solve, packed
from lorakeet.quant.construct import empty_base
from lorakeet.quant.gptq import (
    PARTS,
    GptqBase,
    GptqGrid,
    ZeroFormat,
    codes_for,
    fit_group,
    gptq_buffer_shapes,
    groups_in_order,
    pack_words,
    quantise_to_nearest,
    words_for,
)
from lorakeet.quant.gptq_config import GptqConfig, base_from, gptq_mapping, layer_problems, parse
from lorakeet.quant.gptq_solve import GptqLayout, Hessian, bytes_of_solving, gptq_quantise, output_error, sensitivity
from lorakeet.quant.packed import TILE
from tiny.held import HeldBytes

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


def naive(words: Tensor, bits: int) -> Tensor:
    """Code k is made of the bits k·bits … of the column's stream of words, lowest bit first."""
    columns = []
    for column in words.t().tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(column))
        columns.append([(stream >> (bits * place)) & (2**bits - 1) for place in range(len(column) * 32 // bits)])
    return torch.tensor(columns).t()


def test_three_bits_fill_whole_words_only_by_the_32() -> None:
    assert words_for(32, 3) == 3 and words_for(16, 3) is None and words_for(16, 4) == 2
    with pytest.raises(ValueError, match="16 codes of 3 bits"):
        pack_words(torch.zeros(16, 2, dtype=torch.uint8), 3)


SOLVE_OUT, SOLVE_IN, GROUP = 64, 256, 64


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Correlated, of uneven strength, as the inputs of a layer are."""
    chance = torch.Generator().manual_seed(0)
    mixed = torch.randn(2048, 48, generator=chance) @ torch.randn(48, SOLVE_IN, generator=chance)
    return (mixed + torch.randn(2048, SOLVE_IN, generator=chance)) * torch.rand(SOLVE_IN, generator=chance)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(SOLVE_OUT, SOLVE_IN, generator=torch.Generator().manual_seed(1)) * 0.05


def hessian_of(x: Tensor) -> Tensor:
    hessian = Hessian(SOLVE_IN)
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
    base.g_idx.copy_(groups_in_order(SOLVE_IN, GROUP))
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
    codes, grid = quantise_to_nearest(weight, 4, True, torch.arange(SOLVE_IN, dtype=torch.int32) % 4, 4)
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
def test_memory_in_use_is_what_is_planned(
    layout: GptqLayout, dtype: torch.dtype, shape: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more, and not half as much again; with small tiles, as in a large weight, packing the codes is not the peak."""
    for module in (gptq, gptq_solve):
        monkeypatch.setattr(module, "TILE", tile)
    hessian = Hessian(shape[1])
    hessian.add(torch.randn(2 * shape[1], shape[1], generator=torch.Generator().manual_seed(0)))
    weight, inputs = torch.randn(shape).to(dtype), sensitivity(hessian.matrix)
    with HeldBytes() as held:
        gptq_quantise(weight, inputs, layout)
    assert held.peak <= bytes_of_solving(shape, layout, dtype) <= 1.5 * held.peak


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


STORED: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def tensors(**changes: Tensor) -> dict[str, Tensor]:
    """The parts of a layer of 16 outputs and 64 inputs."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    base = GptqBase.of(*quantise_to_nearest(weight, 4, True, groups_in_order(64, 32), 2), bits=4, sym=True)
    return {**{part: base.get_buffer(part) for part in PARTS}, **changes}


def problems(parts: dict[str, Tensor], config: GptqConfig) -> list[str]:
    return layer_problems("q", {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}, config)


def test_the_settings_of_every_writer_are_read() -> None:
    assert parse(STORED, "x") == GptqConfig(4, 32)
    assert parse({**STORED, "checkpoint_format": "gptq_v2", "sym": False}, "x") == GptqConfig(4, 32, False, False, "gptq_v2")
    autogptq = {"bits": 3, "group_size": -1, "damp_percent": 0.01, "desc_act": True, "static_groups": False, "sym": True,
                "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None}  # fmt: skip
    assert parse(autogptq, "x") == GptqConfig(3, -1, True)
    ours = gptq_mapping(GptqConfig(8, 128, True, False, "gptq_v2"), damping=0.01, version="1")
    assert parse(ours, "x") == GptqConfig(8, 128, True, False, "gptq_v2")


def test_everything_wrong_is_said_at_once() -> None:
    stored = {"bits": 5, "group_size": 0, "sym": "yes", "checkpoint_format": "marlin", "pack_dtype": "int16", "sparse": "2:4"}
    with pytest.raises(ConfigError) as caught:
        parse(stored, "config.json")
    for words in ("bits is 5; expected one of 2, 3, 4, 8", "group_size is 0", "sym is 'yes'", "'marlin'", "'int16'", "'sparse'"):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="'marlin'"):
        parse({**STORED, "is_marlin_format": True}, "x")


def test_single_layers_may_differ() -> None:
    config = parse({**STORED, "dynamic": {"-:.*down": {}, "+:.*up": {"bits": 8}, ".*gate": {"group_size": -1}}}, "x")
    assert config.for_layer("a.down") is None and config.for_layer("a.q") == config
    up, gate = config.for_layer("a.up"), config.for_layer("a.gate")
    assert up is not None and up.bits == 8 and gate is not None and gate.group_size == -1
    with pytest.raises(ConfigError, match="changes 'lora'"):
        parse({**STORED, "dynamic": {"+:.*up": {"lora": 1}}}, "x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qweight": torch.zeros(8, 17, dtype=torch.int32)}, "'q.qweight' is int32 (8, 17), but 4 bits in groups of 32 need"),
        ({"qzeros": torch.zeros(3, 2, dtype=torch.int32)}, "need int32 (2, 2)"),
        ({"scales": torch.zeros(1, 16, dtype=torch.float16)}, "need float16 (2, 16)"),
        ({"scales": torch.zeros(2, 16, dtype=torch.int32)}, "'q.scales' is int32"),
        ({"g_idx": torch.zeros(60, dtype=torch.int32)}, "do not fit"),
    ],
)
def test_each_tensor_that_does_not_fit_is_named(change: dict[str, Tensor], said: str) -> None:
    assert said in "\n".join(problems(tensors(**change), GptqConfig(4, 32)))
    assert problems(tensors(), GptqConfig(4, 32)) == []


def test_g_idx_may_be_missing_only_without_desc_act() -> None:
    parts = tensors()
    whole = base_from("q", parts, GptqConfig(4, 32)).dense()
    del parts["g_idx"]
    assert torch.equal(base_from("q", parts, GptqConfig(4, 32)).dense(), whole)
    assert problems(parts, GptqConfig(4, 32)) == []
    assert "'q.g_idx' is missing, and desc_act is true" in problems(parts, GptqConfig(4, 32, desc_act=True))[0]


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="names groups 0 to 7; there are 2"):
        base_from("q", tensors(g_idx=torch.arange(64, dtype=torch.int32) // 8), GptqConfig(4, 32))
    with pytest.raises(DataError, match="not finite"):
        base_from("q", tensors(scales=torch.full((2, 16), 1e9)), GptqConfig(4, 32))
