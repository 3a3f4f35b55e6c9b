"""Models that the server cannot write texts of are refused from their configuration, with the reason and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.initialization import no_init_weights

from lorakeet.errors import ConfigError
from lorakeet.models.files.validate import auto_class_of
from lorakeet.models.servable import REMEDY, require_served, why_not_served
from lorakeet.models.spec import ModelSpec
from tiny.family_columns import saved
from tiny.small_configs import small_config

ALL = os.environ.get("LORAKEET_FAMILIES", "") not in ("", "0")
RESULTS = Path(__file__).parents[1] / "families" / "results.json"
REASONS = {
    "qwen3_5": "Qwen3_5GatedDeltaNet carries a state from token to token",
    "lfm2": "Lfm2ShortConv carries a state",
    "mamba2": "Mamba2Mixer carries a state",
    "kimi_linear": "KimiLinearDeltaAttention and KimiLinearAttention carry a state",
    "deepseek_v32": "its indexer chooses by a mask",
    "glm_moe_dsa": "its indexer chooses by a mask",
    "diffllama": "its blocks attend twice",
    "hrm_text": "its blocks run several times",
    "stablelm": "does not tell its attention where a text",
    "doge": "adds a mask of its own",
    "falcon": "its attention cannot be exchanged",
    "llama4_text": "",
    "deepseek_v3": "",
    "gemma3": "",
    "phi4_multimodal": "",  # whose audio tower, within its decoder, has convolutions
    "gpt_oss": "",
}


def shapes_of(config: Any) -> Any:
    with torch.device("meta"), no_init_weights():
        return auto_class_of(config).from_config(config)


@pytest.mark.parametrize("kind", REASONS)
def test_the_table_names_the_reason_of_each_kind(kind: str) -> None:
    found = why_not_served(shapes_of(small_config(kind)))
    assert found == "" if not REASONS[kind] else REASONS[kind] in found


def test_granite_s_hybrid_type_without_a_hybrid_layer_is_served() -> None:
    """Granite 4 Micro has the model_type of its hybrid siblings, and attention in every layer."""
    config = small_config("granitemoehybrid")
    assert "carries a state" in why_not_served(shapes_of(config))
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    assert not why_not_served(shapes_of(config))


def test_a_folder_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    folder = saved("glm_moe_dsa", tmp_path)
    for file in folder.glob("*.safetensors"):  # whole, but of no tensor: reading it as weights would fail
        file.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConfigError) as refused:
        require_served(ModelSpec(path=str(folder)), lambda line: None)
    said = str(refused.value)
    assert said.startswith(f"{folder} is a 'glm_moe_dsa' model, which cannot be served here: its indexer") and REMEDY in said
    assert "lorakeet merge" in REMEDY and "lorakeet export" in REMEDY and "--engine vllm" in REMEDY


@pytest.mark.families
@pytest.mark.parametrize("kind", json.loads(RESULTS.read_text())["families"] if ALL else ())
def test_the_table_says_what_the_families_page_says(kind: str) -> None:
    one = json.loads(RESULTS.read_text())["families"][kind]
    if one.get("serve") is None:
        pytest.skip("it does not train")
    assert bool(why_not_served(shapes_of(small_config(kind)))) == (one["serve"]["outcome"] == "refused")
