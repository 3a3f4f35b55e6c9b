"""Pairs on 3-D expert parameters: order of nesting and of the expert axis, against the installed PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakeet.core.adapter import Adapter
from lorakeet.errors import DataError
from lorakeet.formats.files.safetensors_file import open_safetensors
from lorakeet.formats.peft import peft as lorakeet_peft
from lorakeet.formats.peft import peft_experts
from tiny.adapters import random_pair
from tiny.models import tiny_model
from tiny.peft_oracle import EXPERTS, by_peft, change_config


def test_experts_are_the_fast_axis_of_b(tmp_path: Path) -> None:
    """Against the change that PEFT itself computes for each nested parameter."""
    theirs = by_peft(tmp_path, tiny_model("mixtral"), target_modules=[], target_parameters=EXPERTS)
    adapter = lorakeet_peft.read(tmp_path)
    block = theirs.base_model.model.model.layers[1].mlp.experts
    assert (block.parameter_name, block.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
    for wrapper in (block, block.base_layer):
        ours = adapter.pairs[f"model.layers.1.mlp.experts.{wrapper.parameter_name}"]
        assert ours.A.shape[:2] == (4, 4) and ours.alpha == 12
        assert torch.allclose(wrapper.get_delta_weight("default"), ours.delta(), atol=1e-6)


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_a_single_parameter_is_not_nested(parameter: str, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    path = f"model.layers.0.mlp.experts.{parameter}"
    lorakeet_peft.write(Adapter({path: random_pair("experts", model.get_parameter(path))}), tmp_path)
    names = set(open_safetensors(tmp_path / "adapter_model.safetensors").tensors)
    assert names == {f"base_model.model.model.layers.0.mlp.experts.lora_{ab}.weight" for ab in "AB"}
    assert set(lorakeet_peft.read(tmp_path).pairs) == {path}


def test_pack_undoes_unpack() -> None:
    A, B = torch.randn(12, 8), torch.randn(6, 12)  # 3 experts of rank 4
    unpacked = peft_experts.unpack_experts(A, B, 4)
    assert not isinstance(unpacked, str)
    assert unpacked[0].shape == (3, 4, 8) and unpacked[1].shape == (3, 6, 4)
    assert torch.equal(unpacked[1][2, :, 1], B[:, 1 * 3 + 2])
    assert all(torch.equal(a, b) for a, b in zip(peft_experts.pack_experts(*unpacked), (A, B), strict=True))


def test_nesting_that_cannot_be_distinguished_is_refused(tmp_path: Path) -> None:
    by_peft(tmp_path, tiny_model("mixtral"), target_modules=[], target_parameters=EXPERTS)
    change_config(tmp_path, target_parameters=[EXPERTS[0]])
    with pytest.raises(DataError, match="has 2 pairs on its parameters, and target_parameters names 1"):
        lorakeet_peft.read(tmp_path)


def test_a_rank_that_does_not_divide_the_rows_is_refused(tmp_path: Path) -> None:
    by_peft(tmp_path, tiny_model("mixtral"), target_modules=[], target_parameters=EXPERTS)
    change_config(tmp_path, r=5)
    with pytest.raises(DataError, match=r"has A \(16, 32\) and B \(96, 16\); expected \(experts·5, in\)"):
        lorakeet_peft.read(tmp_path)
