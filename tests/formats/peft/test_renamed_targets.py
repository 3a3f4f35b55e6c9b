"""PEFT reads adapters of models whose targets it renames as they are: it is asked, model by model."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft as real_peft
import pytest
import torch
import transformers
from rich.console import Console
from transformers import conversion_mapping

from lorakeet.core.adapter import MODEL_TYPE, Adapter
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.formats import mlx
from lorakeet.formats.peft import peft
from lorakeet.formats.peft.renamed_targets import (
    RENAMED,
    as_parameter,
    model_type_of,
    model_type_to_keep,
    needs_parameter,
    refused_by_peft,
)
from lorakeet.models import inject
from lorakeet.models.families import family_of
from lorakeet.models.targets import plan_for
from lorakeet.verbs.convert import convert
from lorakeet.verbs.options import ConvertOptions
from tiny.models import tiny_model

IDS = (torch.arange(12) * 7 % 50)[None]
WITHOUT_EXPERTS = {"exclude_modules": ("experts",)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def read_by_peft(family: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return real_peft.PeftModel.from_pretrained(tiny_model(family), folder)


def trained(family: str, **settings: Any) -> Any:
    model = tiny_model(family)
    spec = LoraSpec(rank=2, rank_pattern={"mlp.down_proj": 3}, alpha_pattern={"mlp.down_proj": 5}, **settings)
    inject.inject(model, plan_for(model, spec, family_of(model.config)), seed=0)
    fill(model)
    return model


def fill(model: Any) -> None:
    """Gives every pair an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in inject.trained_parameters(model).items():
            if name.endswith(".B"):
                parameter.normal_(0, 0.3, generator=generator)


@pytest.mark.parametrize("settings", [{}, WITHOUT_EXPERTS], ids=["all", "without experts"])
@pytest.mark.parametrize("family", ["glm4_moe", "ernie_moe", "deepseek_v3", "afmoe"])
def test_peft_computes_what_was_trained(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Also the pairs of dense layers and shared experts, whose names are those that experts had."""
    model = trained(family, **settings)
    adapter = inject.adapter_of(model, base="base")
    assert any(as_parameter(adapter, path) for path in adapter.pairs)
    peft.write(adapter, tmp_path)
    loaded = read_by_peft(family, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(loaded) - logits(tiny_model(family))).abs().max() > 0.1
    back = peft.read(tmp_path)
    assert back.metadata[MODEL_TYPE] == model.config.model_type
    assert {path: (pair.kind, pair.rank, pair.alpha) for path, pair in back.pairs.items()} == {
        path: (pair.kind, pair.rank, pair.alpha) for path, pair in adapter.pairs.items()
    }
    assert all(torch.equal(back.pairs[path].A, pair.A) and torch.equal(back.pairs[path].B, pair.B)
               for path, pair in adapter.pairs.items())  # fmt: skip


def test_the_table_is_that_of_the_installed_transformers() -> None:
    """A type that is missing here loses pairs in PEFT; one too many is read by PEFT all the same."""
    patterns = conversion_mapping._MODEL_TO_CONVERSION_PATTERN
    theirs = {kind for kind, like in patterns.items() if like in ("mixtral", "qwen2_moe") and not kind[0].isupper()}
    assert theirs <= RENAMED.keys(), "add these to formats/peft/renamed_targets"


def test_what_peft_refuses_gets_no_pair_by_default() -> None:
    """Mamba's out_proj, whose weight kernels read without its module; out_proj of another model is a target."""
    config = transformers.Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, num_hidden_layers=2, vocab_size=96, chunk_size=8
    )
    with torch.device("meta"):
        model = transformers.Mamba2ForCausalLM(config)
    plan = plan_for(model, LoraSpec(rank=2), family_of(config))
    assert {entry.path.rpartition(".")[2] for entry in plan.entries} == {"in_proj"}
    targets = [entry.path for entry in plan.entries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real_peft.get_peft_model(model, real_peft.LoraConfig(r=2, target_modules=targets))
        with pytest.raises(ValueError, match="'out_proj' is incompatible"):
            real_peft.get_peft_model(model, real_peft.LoraConfig(r=2, target_modules=["out_proj"]))
    assert not refused_by_peft("opt", "model.layers.0.self_attn.out_proj")


def test_other_models_keep_their_targets(tmp_path: Path) -> None:
    adapter = inject.adapter_of(trained("qwen2", target_modules=("all-linear",)), base="base")
    assert adapter.metadata == {} == model_type_to_keep("llama")
    peft.write(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "target_parameters" not in config and any(path.endswith("gate_proj") for path in config["target_modules"])


def with_dora(adapter: Adapter) -> Adapter:
    pairs = {path: replace(pair, magnitude=torch.ones(pair.B.shape[0])) for path, pair in adapter.pairs.items()}
    return replace(adapter, pairs=pairs)


def test_what_peft_cannot_put_on_a_parameter_keeps_its_target() -> None:
    """DoRA: PEFT refuses it on parameters by name."""
    adapter = with_dora(inject.adapter_of(trained("glm4_moe", **WITHOUT_EXPERTS), base="base"))
    assert adapter.metadata == {MODEL_TYPE: "glm4_moe"} and not any(as_parameter(adapter, path) for path in adapter.pairs)


def test_dora_that_peft_could_not_read_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    """On the layers with names that experts had; on all others PEFT reads it."""
    for family in ("glm4_moe", "ernie_moe", "deepseek_v3", "afmoe"):
        with pytest.raises(ConfigError, match=r"lora.variant dora on .*gate_proj' cannot be read by PEFT.*lora.exclude_modules"):
            trained(family, variant="dora", **WITHOUT_EXPERTS)
    peft.write(with_dora(inject.adapter_of(trained("glm4_moe", **WITHOUT_EXPERTS), base="base")), tmp_path / "refused")
    with pytest.raises(ValueError, match="does not work with use_dora"):
        read_by_peft("glm4_moe", tmp_path / "refused")
    model = tiny_model("glm4_moe")
    plan = plan_for(model, LoraSpec(rank=2, variant="dora", target_modules=("attention",)), family_of(model.config))
    inject.inject(model, plan, seed=0)
    fill(model)
    peft.write(inject.adapter_of(model, base="base"), tmp_path / "read")
    torch.testing.assert_close(logits(read_by_peft("glm4_moe", tmp_path / "read")), logits(model), rtol=1e-4, atol=1e-4)
    plan_for(tiny_model("qwen2"), LoraSpec(rank=2, variant="dora"), family_of(tiny_model("qwen2").config))


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"model_type": "glm4_moe"}, "glm4_moe"), ({"model_type": "llama"}, None), ({}, None),
        ({"model_type": "wrapper", "text_config": {"model_type": "qwen3_moe"}}, "qwen3_moe"), ({"text_config": "no table"}, None),
    ],
)  # fmt: skip
def test_the_type_is_had_from_a_configuration(config: dict[str, Any], kept: str | None) -> None:
    assert model_type_of(config) == ({MODEL_TYPE: kept} if kept else {})
    assert needs_parameter(kept or "llama", "a.gate_proj") == (kept is not None) and not needs_parameter("glm4_moe", "a.o_proj")


def test_peft_computes_a_converted_adapter_whose_base_is_named(tmp_path: Path) -> None:
    """The file of another program does not say the type of its base."""
    model = trained("glm4_moe", **WITHOUT_EXPERTS)
    mlx.write(replace(inject.adapter_of(model), metadata={}), tmp_path / "a.mlx")
    tiny_model("glm4_moe").config.save_pretrained(tmp_path / "base")
    options = ConvertOptions(tmp_path / "a.mlx", tmp_path / "adapter", to="peft", base=tmp_path / "base")
    convert(options, console=Console(quiet=True))
    loaded = read_by_peft("glm4_moe", tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
