"""Models that the server cannot write texts of are refused from their configuration, with the reason and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from lorakeet.errors import ConfigError
from lorakeet.exporting.gguf_model import write_gguf
from lorakeet.models import servable
from lorakeet.models.modules import decoder_of
from lorakeet.models.servable import REMEDY, few_blocks_of, require_served, why_not_served
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import ReadBefore, load_tokenizer
from tiny.family_columns import saved
from tiny.small_configs import small_config

ALL = os.environ.get("LORAKEET_FAMILIES", "") not in ("", "0")
RESULTS = Path(__file__).parents[1] / "families" / "results.json"
REASONS = {
    "qwen3_5": "",
    "lfm2": "",
    "jamba": "JambaMambaMixer carries a state from token to token in a way of its own",
    "glm5_next": "Glm5NextTextLinearAttention carries a state",
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


@pytest.mark.parametrize("kind", REASONS)
def test_the_table_names_the_reason_of_each_kind(kind: str) -> None:
    found = why_not_served(few_blocks_of(small_config(kind)))
    assert found == "" if not REASONS[kind] else REASONS[kind] in found


def test_granite_s_hybrid_type_without_a_hybrid_layer_is_served() -> None:
    """Granite 4 Micro has the model_type of its hybrid siblings, and attention in every layer."""
    config = small_config("granitemoehybrid")
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    assert not why_not_served(few_blocks_of(config))


def test_a_folder_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    folder = saved("glm_moe_dsa", tmp_path)
    for file in folder.glob("*.safetensors"):  # whole, but of no tensor: reading it as weights would fail
        file.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConfigError) as refused:
        require_served(ModelSpec(path=str(folder)), lambda line: None)
    said = str(refused.value)
    assert said.startswith(f"{folder} is a 'glm_moe_dsa' model, which cannot be served here: its indexer") and REMEDY in said
    assert "lorakeet merge" in REMEDY and "lorakeet export" in REMEDY and "--engine vllm" in REMEDY


def test_a_gguf_file_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servable, "find_source", lambda *_: pytest.fail("its weights are unpacked"))
    for kind in ("lfm2", "llama"):
        folder = saved(kind, tmp_path / kind)
        write_gguf(folder, None, tmp_path / f"{kind}.gguf", tokenizer=load_tokenizer(folder), quant="f32")
    assert require_served(ModelSpec(path=str(tmp_path / "llama.gguf")), lambda line: None) == ReadBefore()
    require_served(ModelSpec(path=str(tmp_path / "lfm2.gguf")), lambda line: None)
    monkeypatch.setitem(servable.NOT_SERVED, "lfm2", "this test says so")
    with pytest.raises(ConfigError, match=r"lfm2\.gguf is a 'lfm2' model, which cannot be served here: this test says so\."):
        require_served(ModelSpec(path=str(tmp_path / "lfm2.gguf")), lambda line: None)


@pytest.mark.parametrize(
    ("kind", "blocks", "changes"),
    [
        ("llama", 8, {}),
        ("lfm2", 5, {"layer_types": [*["conv"] * 4, *["full_attention"] * 76]}),
        ("gemma3", 6, {}),  # a wrapper, five windows before each whole attention
    ],
)
def test_a_model_of_many_blocks_is_checked_on_few(kind: str, blocks: int, changes: dict[str, Any]) -> None:
    config = CONFIG_MAPPING[kind]()
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    for name, value in {"layer_types": (kinds * 80)[:80] or None, **changes}.items():
        setattr(text, name, value)
    text.num_hidden_layers = 80
    decoder = decoder_of(few_blocks_of(config))
    assert len(decoder.layers) == blocks and text.num_hidden_layers == 80


def test_a_model_that_cannot_be_cut_is_checked_whole() -> None:
    """Gemma 3n counts the blocks that share keys and values from the end: 15 of 35, more than its first ones of each kind."""
    config = CONFIG_MAPPING["gemma3n_text"]()
    assert config.num_kv_shared_layers == 15 and config.layer_types.index("full_attention") == 4
    assert len(decoder_of(few_blocks_of(config)).layers) == config.num_hidden_layers == 35


@pytest.mark.families
@pytest.mark.parametrize("kind", json.loads(RESULTS.read_text())["families"] if ALL else ())
def test_the_table_says_what_the_families_page_says(kind: str) -> None:
    one = json.loads(RESULTS.read_text())["families"][kind]
    if one.get("serve") is None:
        pytest.skip("it does not train")
    assert bool(why_not_served(few_blocks_of(small_config(kind)))) == (one["serve"]["outcome"] == "refused")
