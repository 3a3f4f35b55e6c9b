"""int8 by rows: half a step of error at most, rounded once, tiles that change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakeet.quant.adopt import empty_base
from lorakeet.quant.int8 import Int8Base


@pytest.fixture
def weight() -> torch.Tensor:
    found = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    found[3] = 0
    return found


def test_each_number_is_off_by_half_a_step_at_most(weight: torch.Tensor) -> None:
    base = Int8Base.of(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((base.dense() - weight).abs() <= step * 0.5001).all())
    assert base.dense().abs().amax(1).tolist() == pytest.approx(weight.abs().amax(1).tolist())
    assert base.bytes == weight.numel() + 4 * 9


def test_unpacking_rounds_once(weight: torch.Tensor) -> None:
    base = Int8Base.of(weight)
    assert torch.equal(base.unpack(torch.empty(9, 50, dtype=torch.bfloat16)), base.dense().bfloat16())


def test_tiles_change_nothing(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Int8Base.of(weight)
    monkeypatch.setattr("lorakeet.quant.packed.TILE", 100)
    tiled = Int8Base.of(weight)
    assert torch.equal(whole.packed, tiled.packed) and torch.equal(whole.dense(), tiled.dense())


def test_buffers_go_through_safetensors(weight: torch.Tensor, tmp_path: Path) -> None:
    base = Int8Base.of(weight)
    save_file(dict(base.named_buffers()), tmp_path / "base.safetensors")
    again = empty_base(base.settings)
    again.load_state_dict(load_file(tmp_path / "base.safetensors"))
    assert torch.equal(again.dense(), base.dense())


def test_another_shape_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(9, 50\)"):
        Int8Base((4, 4)).store(weight)
