"""llama.cpp computes what transformers computes, for each kind of tensor that a family of `gguf_families` has of its own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorakeet.errors import ConfigError
from lorakeet.exporting.gguf_families import ARCHITECTURES
from lorakeet.exporting.gguf_layout import model_layout
from lorakeet.exporting.gguf_model import GgufTensors, write_gguf
from lorakeet.exporting.llama_cpp import LlamaCpp
from lorakeet.exporting.merged_tensors import compare_stored
from lorakeet.formats import gguf
from lorakeet.formats.files.base_model import open_base
from lorakeet.formats.files.gguf_file import GgufFile
from lorakeet.formats.peft import peft
from lorakeet.models.text.load import load_tokenizer
from tiny import family_columns, small_configs

KINDS = ["sliding_attention", "full_attention"] * 3
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),  # a tensor for each expert
    ("qwen2_moe", {}),  # and an expert that all share
    ("lfm2_moe", {}),  # convolutions, and a first block without experts
    ("granitemoe", {}),  # gate and up of the experts in one tensor
    ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}),  # Granite 4 H without experts
    ("granitemoehybrid", {"num_local_experts": 0, "layer_types": ["attention"] * 4, "position_embedding_type": "rope"}),
    ("granite", {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    ("hunyuan_v1_dense", {"rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4}}),
    ("smollm3", {}),  # every fourth block without rotation
    ("ministral3", {}),  # queries scaled by position
    ("qwen3_5_moe", {}),  # DeltaNet with two heads of v for one of k
    ("qwen3_next", {}),  # the same, with q, k, v and z together
    ("voxtral", {}),  # a wrapper whose configuration does not say whether the head is the embedding
    ("gemma4_text", {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "layer_types": KINDS}),
    ("gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}),
]


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def change(kind: str, settings: dict[str, Any]) -> None:
        known = copy.deepcopy(small_configs.CHANGES)
        known[kind] = {**known.get(kind, {}), **settings}
        monkeypatch.setattr(small_configs, "CHANGES", known)

    return change


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value))
def test_llama_cpp_computes_the_merged_model(kind: str, settings: dict[str, Any], changed: Any, tmp_path: Path) -> None:
    changed(kind, settings)
    family_columns.saved(kind, tmp_path)
    family_columns.train(tmp_path)
    family_columns.gguf(tmp_path)


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
@pytest.mark.parametrize("kind", ["lfm2", "granitemoehybrid", "qwen3_5_text", "gpt_oss", "qwen3_moe", "gemma4_text"])
def test_what_llama_cpp_multiplies_in_fp32_alone_stays_so(kind: str, quant: str, tmp_path: Path) -> None:
    """Of another type it would end the process."""
    folder = family_columns.saved(kind, tmp_path)
    written = write_gguf(folder, None, tmp_path / "m.gguf", tokenizer=load_tokenizer(folder), quant=quant)
    model = family_columns.in_transformers(folder)
    row = family_columns.rows()[0].ids[:8].tolist()
    with LlamaCpp(written.path, context=64) as engine, torch.no_grad():
        found, wanted = engine.logits(row), model(torch.tensor([row])).logits[0]
    assert float((found - wanted).abs().max()) < 0.3 * float(wanted.abs().max())
    assert written.types[quant.upper()] > 8


def test_settings_that_a_file_leaves_out_are_those_of_the_familys_class(tmp_path: Path) -> None:
    """As LiquidAI publishes LFM2: the width and the kinds of blocks under older names."""
    folder = family_columns.saved("lfm2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    width, kinds = config.pop("intermediate_size"), config.pop("layer_types")
    config |= {"block_ff_dim": width, "full_attn_idxs": [at for at, kind in enumerate(kinds) if kind == "full_attention"]}
    (folder / "config.json").write_text(json.dumps(config))
    family_columns.train(tmp_path)
    family_columns.gguf(tmp_path)


@pytest.mark.parametrize("kind", ["smollm3", "ministral3", "granite", "mistral3"])
def test_llama_cpp_computes_an_adapter_file_beside_its_base(kind: str, tmp_path: Path) -> None:
    folder = family_columns.saved(kind, tmp_path)
    family_columns.train(tmp_path)
    write_gguf(folder, None, tmp_path / "base.gguf", tokenizer=load_tokenizer(folder), quant="f32")
    gguf.write(peft.read(tmp_path / "adapter"), tmp_path / "lora.gguf", base=open_base(folder))
    row = family_columns.rows()[0].ids.tolist()
    wanted = torch.load(tmp_path / "logits.pt")[: len(row) - 1]
    with LlamaCpp(tmp_path / "base.gguf", adapter=tmp_path / "lora.gguf", context=64) as engine:
        found = engine.logits(row)[:-1]
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "granitemoehybrid"])
def test_each_stored_tensor_is_that_of_the_folder(kind: str, tmp_path: Path) -> None:
    folder = family_columns.saved(kind, tmp_path)
    written = write_gguf(folder, None, tmp_path / "m.gguf", tokenizer=load_tokenizer(folder), quant="f32")
    found = compare_stored(GgufTensors(folder, None), GgufFile(written.path).tensors())
    assert found and all(one.rounding == 0 for one in found.values())


def test_what_predicts_several_tokens_is_left_out_and_said(tmp_path: Path) -> None:
    folder = family_columns.saved("qwen3_5_text", tmp_path)
    weights = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    save_file({**weights, "mtp.fc.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    written = write_gguf(folder, None, tmp_path / "m.gguf", tokenizer=load_tokenizer(folder), quant="f32")
    assert "1 tensors of the prediction of several tokens were left out." in written.notes
    with LlamaCpp(written.path, context=64) as engine:
        assert engine.logits([5, 6, 7]).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False; llama.cpp's qwen3moe computes it with True."),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, r"no_rope_layers is \[1, 1, 1, 1\]; llama.cpp's smollm3 rotates all but"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 4}, "every 2th block"),
        ("lfm2", {"layer_types": ["full_attention"] * 4}, "layer_types names no convolution"),
        ("arcee", {"hidden_act": "silu"}, "The activation is 'silu'; llama.cpp's arcee computes relu2."),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    config = json.loads(small_configs.small_config(kind).to_json_string()) | settings
    with pytest.raises(ConfigError, match=message):
        model_layout(config, "folder")


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = family_columns.saved("mixtral", tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if ".experts.1.w1." in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"ffn_gate_exps.weight lacks some of its experts: the folder has \[0, 2, 3\]"):
        GgufTensors(folder, None)


def test_every_family_has_a_name_that_gguf_knows() -> None:
    from gguf import MODEL_ARCH_NAMES

    assert {one.name for one in ARCHITECTURES.values()} <= set(MODEL_ARCH_NAMES.values())
