"""Reading the module tree, adapted or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lorakeet.core.spec import LoraSpec
from lorakeet.models import modules
from lorakeet.models.families import GENERIC, family_of
from lorakeet.models.files.quantized import skeleton
from lorakeet.models.targets import plan_for
from tiny.models import tiny_model
from tiny.small_configs import small_config


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_an_adapted_model_reads_as_its_base(adapted: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    before = [(path, id(module)) for path, module in modules.original_modules(model)]
    assert before == [(path, id(module)) for path, module in model.named_modules(remove_duplicate=False)]
    adapted(model)
    assert [(path, id(module)) for path, module in modules.original_modules(model)] == before
    for path, layer in modules.adapted_layers(model):
        assert modules.find(model, path) is layer
        assert modules.path_of(model, layer.original) == path


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_blocks_are_found_without_a_family(name: str) -> None:
    model = tiny_model(name)
    assert modules.block_prefix(model, GENERIC) == modules.block_prefix(model, family_of(model.config)) != ("", 0)


@pytest.mark.parametrize("family", ["hunyuan_moe", "afmoe", "mixtral", "qwen3_moe"])
def test_no_part_of_a_router_is_adapted_by_default(family: str) -> None:
    """Also where the router's matrix lies in a module of its own."""
    model = tiny_model(family)
    paths = [entry.path for entry in plan_for(model, LoraSpec(), family_of(model.config)).entries]
    assert any(path.endswith("experts.gate_up_proj") for path in paths)
    assert not [path for path in paths if ".router." in path or ".gate." in path or path.endswith(".gate")]


def test_a_gate_that_is_no_router_is_adapted() -> None:
    model = tiny_model("gemma4")
    paths = [entry.path for entry in plan_for(model, LoraSpec(rank=2), family_of(model.config)).entries]
    assert "model.layers.0.per_layer_input_gate" in paths


def test_the_blocks_of_a_wrapper_are_those_of_its_text_part() -> None:
    """Its vision tower has more blocks, which `layers top:1` does not count."""
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28}
    config = transformers.Gemma3Config(text_config={**text, "head_dim": 8}, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(config)
    assert modules.block_prefix(model, GENERIC) == ("model.language_model.layers", 2)
    plan = plan_for(model, LoraSpec(layers="top:1", target_modules=("q_proj",)), GENERIC)
    inside = [entry.path for entry in plan.entries if entry.path.startswith("model.language_model.")]
    assert inside == ["model.language_model.layers.1.self_attn.q_proj"]


def test_a_tower_within_the_decoder_has_no_blocks_of_the_text() -> None:
    """Phi 4's vision and audio parts stand within its decoder. A plan takes few blocks of the text, and theirs were more."""
    config = small_config("phi4_multimodal")
    config.num_hidden_layers = 2
    assert config.vision_config.num_hidden_layers > 2
    model = skeleton(config)
    assert modules.block_prefix(model, GENERIC) == ("model.layers", 2)
    assert modules.blocks_run_once(model, GENERIC)


def test_blocks_that_run_several_times_are_known() -> None:
    for family, once in {"llama": True, "gpt2": True, "gemma4": True, "hrm_text": False}.items():
        model = tiny_model(family)
        assert modules.blocks_run_once(model, family_of(model.config)) is once
    assert not modules.blocks_run_once(nn.Linear(2, 2), GENERIC)


def test_no_blocks() -> None:
    assert modules.block_prefix(nn.Linear(2, 2), GENERIC) == ("", 0)


@pytest.mark.parametrize(
    ("kind", "text", "outside"),
    [
        ("gemma3", "model.language_model", ["model.vision_tower", "model.multi_modal_projector"]),
        ("mistral3", "model.language_model", ["model.vision_tower", "model.multi_modal_projector"]),
        ("phi4_multimodal", "", ["model.embed_tokens_extend"]),
        ("hyperclovax_vision_v2", "model.language_model", ["model.vision_model", "model.projector"]),  # a linear layer itself
        ("git", "", ["git.image_encoder", "git.visual_projection"]),
        ("llama", "", []),
    ],
)
def test_what_stands_beside_the_text_part_of_a_wrapper_gets_no_pair(kind: str, text: str, outside: list[str]) -> None:
    model = skeleton(small_config(kind))
    assert modules.text_part(model) == text and modules.outside_text(model) == outside
    planned = plan_for(model, LoraSpec(rank=2), family_of(model.config.get_text_config()))
    assert planned.entries and not [entry.path for entry in planned.entries for part in outside if entry.path.startswith(part)]
    named = LoraSpec(rank=2, target_modules=("vision_tower.encoder.layers.0.mlp.fc1",))
    if kind == "gemma3":
        assert len(plan_for(model, named, GENERIC).entries) == 1  # by name it does


def test_the_decoder_makes_hidden_states_also_where_transformers_names_the_whole_model() -> None:
    model = skeleton(small_config("llama4_text"))
    assert model.get_decoder() is model and modules.decoder_of(model) is model.model
    assert modules.block_prefix(model, GENERIC) == ("model.layers", 4)
    llama = tiny_model("llama")
    assert modules.decoder_of(llama) is llama.model


READ_OR_CHOSEN = [("deepseek_v32", ".indexer."), ("gemma3n_text", ".correction_coefs."), ("jamba", ".dt_proj.")]


@pytest.mark.parametrize(("kind", "part"), READ_OR_CHOSEN)
def test_no_pair_where_no_gradient_arrives(kind: str, part: str) -> None:
    model = skeleton(small_config(kind))
    assert any(part in path for path, _ in model.named_parameters())
    planned = plan_for(model, LoraSpec(rank=2), family_of(model.config))
    assert planned.entries and not [entry.path for entry in planned.entries if part in f"{entry.path}."]
