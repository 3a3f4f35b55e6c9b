"""The base of a conversion: configurations and shapes from headers, and whether an adapter fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakeet.core.adapter import Adapter
from lorakeet.errors import DataError
from lorakeet.formats.files.base_model import check_fits, open_base
from tiny.adapters import random_pair


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A diffusers pipeline with two components, each one weight."""
    for name, weights, config in (
        ("unet", {"mid_block.resnets.0.conv1.weight": torch.ones(8, 4, 3, 3)}, {"_class_name": "UNet2DConditionModel"}),
        ("text_encoder", {"encoder.layers.0.mlp.fc1.weight": torch.full((6, 4), 2.0)}, {"model_type": "clip_text_model"}),
    ):
        (tmp_path / "sd" / name).mkdir(parents=True)
        save_file(weights, tmp_path / "sd" / name / "model.safetensors")
        (tmp_path / "sd" / name / "config.json").write_text(json.dumps(config))
    return tmp_path / "sd"


def test_a_pipeline_has_components_with_canonical_paths(pipeline: Path) -> None:
    base = open_base(pipeline)
    assert set(base.configs) == {"unet", "text_encoder"} and base.config("unet")["_class_name"] == "UNet2DConditionModel"
    assert base.shape("unet.mid_block.resnets.0.conv1") == (8, 4, 3, 3) and base.shape("unet.conv_in") is None
    assert float(base.weight("text_encoder.text_model.encoder.layers.0.mlp.fc1").sum()) == 48


def test_a_unet_alone_and_a_configuration_alone(pipeline: Path, tiny_llama_folder: Path) -> None:
    assert set(open_base(pipeline / "unet").configs) == {"unet"} and open_base(pipeline / "unet").weights
    assert set(open_base(pipeline / "unet" / "config.json").configs) == {"unet"}
    llama = open_base(tiny_llama_folder)
    assert llama.config()["model_type"] == "llama" and llama.shape("model.layers.1.self_attn.k_proj") == (16, 32)


def test_what_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("[")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("")
    for name, message in (
        ("gone", "is neither a folder nor a .json file"),
        ("text.json", "is not JSON"),
        ("folder", r"holds no config\.json, only notes\.txt"),
    ):
        with pytest.raises(DataError, match=message):
            open_base(tmp_path / name)


def test_pairs_that_do_not_fit_are_all_named(pipeline: Path) -> None:
    base = open_base(pipeline)
    conv = "unet.mid_block.resnets.0.conv1"
    good = Adapter({conv: random_pair("conv2d", torch.ones(8, 4, 3, 3))})
    check_fits(good, base)
    check_fits(Adapter({conv: random_pair("conv2d", torch.ones(8, 4, 3, 3), rank=9)}), base)  # said where it is read
    bad = Adapter(
        {
            conv: random_pair("conv2d", torch.ones(8, 5, 3, 3)),
            "unet.mid_block.resnets.0.conv2": random_pair("conv2d", torch.ones(8, 4, 3, 3)),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1": random_pair("linear", torch.ones(6, 5)),
        }
    )
    with pytest.raises(DataError) as caught:
        check_fits(bad, base)
    for words in (
        "3 problems",
        f"{conv} is a pair for a weight (8, 5, 3, 3); {pipeline} has (8, 4, 3, 3) there",
        f"conv2 is no module of {pipeline}. Did you mean '{conv}'?",
        "is a pair for a weight (6, 5)",
    ):
        assert words in str(caught.value)
    check_fits(bad, open_base(pipeline / "unet" / "config.json"))  # a configuration alone says nothing of shapes
