"""A changed weight in a quantised layout: error feedback against rounding to the nearest, on the inputs of the layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.core.math import delta, fold
from lorakeet.core.scratch import SCRATCH
from lorakeet.merging import requantise
from lorakeet.merging.requantise import bytes_of_rounding, round_to_nearest, round_with_feedback
from lorakeet.quant import gguf_codes, gptq
from lorakeet.quant import packed as packed_weights
from lorakeet.quant.gptq import GptqBase, groups_in_order, quantise_to_nearest
from lorakeet.quant.gptq_solve import Hessian, sensitivity
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase
from tiny.held import HeldBytes

OUT, IN, RANK, SCALE = 64, 256, 4, 3.0


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return (numbers(1024, 40, seed=0) @ numbers(40, IN, seed=1) + numbers(1024, IN, seed=2)) * numbers(IN, seed=3).abs()


def packed(kind: str) -> PackedBase:
    weight = 0.05 * numbers(OUT, IN, seed=4)
    if kind == "gptq":
        codes, grid = quantise_to_nearest(weight, 4, True, groups_in_order(IN, 64), IN // 64)
        return GptqBase.of(codes, grid, bits=4, sym=True)
    return Nf4Base.of(weight) if kind == "nf4" else gguf_codes.fit_gguf_scales(weight, kind)


KINDS = ("gptq", "nf4", "Q4_0", "Q4_K")


@pytest.mark.parametrize("kind", KINDS)
def test_much_more_of_a_small_change_reaches_the_outputs(kind: str, inputs: Tensor) -> None:
    """A change smaller than the gaps between values: of its effect on the outputs the nearest values lose far more."""
    like = packed(kind)
    change = delta(numbers(RANK, IN, seed=5), 4e-4 * numbers(OUT, RANK, seed=6), SCALE)
    wanted = fold(like.dense(), change)
    hessian = Hessian(IN)
    hessian.add(inputs)
    found = round_with_feedback(like, wanted, sensitivity(hessian.matrix), hessian.matrix, latent=True)
    nearest = round_to_nearest(like, wanted)
    effect = (inputs @ change.T).norm()
    lost = [float((inputs @ (base.dense() - wanted).T).norm() / effect) for base in (found.base, nearest)]
    assert lost[0] < 0.5 * lost[1]
    assert found.base.settings == like.settings
    measured = float((inputs @ (found.base.dense() - wanted).T).norm() / (inputs @ wanted.T).norm())
    assert found.error == pytest.approx(measured, rel=1e-2)
    torch.testing.assert_close(found.latent.grid.nearest(found.latent.numbers).dense(), found.base.dense())


@pytest.mark.parametrize("kind", KINDS)
def test_an_unchanged_weight_keeps_its_bytes(kind: str, inputs: Tensor) -> None:
    like = packed(kind)
    hessian = Hessian(IN)
    hessian.add(inputs)
    found = round_with_feedback(like, like.dense(), sensitivity(hessian.matrix), hessian.matrix)
    assert found.error < 1e-4
    torch.testing.assert_close(found.base.dense(), like.dense(), rtol=1e-5, atol=1e-6)
    if found.scales == "kept":
        assert all(torch.equal(found.base.get_buffer(part), buffer) for part, buffer in like.named_buffers())


def test_scales_are_fitted_where_the_files_own_are_too_small(inputs: Tensor) -> None:
    like = packed("gptq")
    hessian = Hessian(IN)
    hessian.add(inputs)
    seen = sensitivity(hessian.matrix)
    assert round_with_feedback(like, like.dense() * 4, seen, hessian.matrix).scales == "fitted"


@pytest.mark.parametrize("kind", KINDS)
def test_memory_in_use_is_what_is_planned(kind: str, inputs: Tensor) -> None:
    """Never more, and not half as much again."""
    like, hessian = packed(kind), Hessian(IN)
    hessian.add(inputs)
    wanted, seen = like.dense() * 1.01, sensitivity(hessian.matrix)
    with HeldBytes() as held:
        found = round_with_feedback(like, wanted, seen, hessian.matrix)
    fixed = 2 * 4 * 128 * OUT  # the errors of a block of columns, which count in a weight as narrow as this one
    planned = bytes_of_rounding(OUT * IN, like.settings["method"], like.bytes)
    assert held.peak <= planned + fixed and found.latent is None
    assert planned == 20 * OUT * IN and (1.5 * held.peak >= planned or kind.startswith("Q"))  # whose codes need no words


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_large_weight_parts_are_held_where_all_of_it_was(
    kind: str, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With parts and tiles that are small beside the weight, as 32 MiB are beside 11,008 × 4,096 numbers in fp32."""
    monkeypatch.setitem(globals(), "OUT", 512)
    for module in (packed_weights, gptq, requantise):
        monkeypatch.setattr(module, "TILE", 1 << 10)
    for module in (packed_weights, requantise):
        monkeypatch.setattr(module, "PART_BYTES", 1 << 13)
    like, hessian = packed(kind), Hessian(IN)
    hessian.add(inputs)
    monkeypatch.setattr("lorakeet.quant.gptq_solve.ROWS", 8)  # of H beside the columns, of which a large weight has many more
    wanted, seen = like.dense() * 1.01, sensitivity(hessian.matrix)
    SCRATCH.clear()
    with HeldBytes() as held:
        round_with_feedback(like, wanted, seen, hessian.matrix)
    planned = bytes_of_rounding(OUT * IN, like.settings["method"], like.bytes)
    assert planned == {"nf4": 9, "gptq": 5}.get(kind, 8) * OUT * IN + OUT * IN // 4 + 2 * like.bytes
    fixed = 2 * 4 * 128 * OUT + (1 << 16)  # the errors of a block of columns, and single rows
    assert held.peak <= planned + fixed and 1.5 * held.peak >= planned
