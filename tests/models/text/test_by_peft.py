"""What the real PEFT reads of an adapter: before training the places of its pairs, after it the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.formats.peft import peft
from lorakeet.models import targets
from lorakeet.models.families import family_of
from lorakeet.models.files.validate import auto_class_of
from lorakeet.models.inject import adapter_of, inject, trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text import by_peft
from lorakeet.models.text.by_peft import compare_with_peft, unread_by_peft, why_not_by_peft
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.quant.spec import QuantSpec
from tiny.models import save_tiny_llama, tiny_model
from tiny.outlines import outline
from tiny.small_configs import small_config

ROWS = [Example(np.arange(start, end), np.ones(end - start, bool), "", None, False) for start, end in ((3, 40), (50, 60))]


def planned(model: Any, **settings: Any) -> Any:
    return plan_for(model, LoraSpec(**{"rank": 4, "alpha": 8.0, **settings}), family_of(model.config))


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., TextModel]:
    """`trained(family)`: a base loaded from disk with a random adapter, which is also in tmp_path/adapter.

    The family "padded" is a Llama with more rows than its tokenizer has tokens.
    """

    def build(family: str, dtype: str = "float32", **settings: Any) -> TextModel:
        padded = {"family": "llama", "vocab_size": 400} if family == "padded" else {"family": family}
        text = load_text_model(ModelSpec(path=str(save_tiny_llama(tmp_path / "base", **padded)), dtype=dtype))
        plan = planned(text.model, **settings)
        ids = text.add_tokens(settings.get("new_tokens", ()))
        inject(text.model, plan, token_ids=ids or None)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in trained_parameters(text.model).values():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        peft.write(adapter_of(text.model), tmp_path / "adapter")
        return text

    return build


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe", "glm4_moe", "deepseek_v3", "afmoe", "ernie_moe"])
def test_peft_puts_its_pairs_where_the_plan_has_them(family: str) -> None:
    model = tiny_model(family)
    plan = planned(model)
    assert unread_by_peft(model.config, plan, type(model)) == unread_by_peft(model.config, plan) == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "dora"},
        {"scale_rule": "alpha/sqrt(rank)", "rank_pattern": {"q_proj": 2}},
        {"target_modules": ("q_proj", "embed_tokens", "lm_head")},
        {"target_modules": ("q_proj",), "extra_modules": ("lm_head",)},
        {"new_tokens": ("<a>",)},
    ],
)
def test_each_way_of_training_is_placed(settings: Any) -> None:
    model = tiny_model("llama")
    plan = planned(model, **settings)
    assert unread_by_peft(model.config, plan, type(model)) == ""
    assert unread_by_peft(model.config, replace(plan, entries=())) == "", "new rows alone place nothing"


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "falcon_h1", "granite_hybrid", "dbrx", "gemma3"])
def test_hybrids_and_wrappers_are_placed(name: str) -> None:
    model = outline(name)
    assert unread_by_peft(model.config, planned(model), type(model)) == ""


def test_a_place_that_peft_does_not_take_and_those_that_it_adds_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the parameters of renamed targets, PEFT takes GLM-4-MoE's up_proj of a dense layer for the experts' parameter."""
    model = tiny_model("glm4_moe")
    plan = planned(model, exclude_modules=(r".*\.experts\..*",))
    absent = replace(plan, entries=(*plan.entries, replace(plan.entries[0], path="model.layers.9.self_attn.q_proj")))
    assert unread_by_peft(model.config, absent, type(model)) == "it puts no pair on model.layers.9.self_attn.q_proj"
    assert unread_by_peft(model.config, plan, type(model)) == ""
    monkeypatch.setattr(by_peft, "model_type_to_keep", lambda kind: {})
    found = unread_by_peft(model.config, plan, type(model))
    assert "it puts no pair on model.layers.0.mlp.down_proj" in found
    assert "it puts pairs on model.layers.1.mlp.experts.down_proj" in found


def test_pairs_that_peft_drops_as_it_reads_them_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It places them right, but renames what has the new name already: Mistral Large 4's experts, Laguna's shared ones."""
    for kind, dropped in (("mistral_large4", ("experts", "shared_experts")), ("laguna", ("shared_experts",))):
        config = small_config(kind)
        with torch.device("meta"):
            model = auto_class_of(config).from_config(config)
        assert unread_by_peft(config, planned(model)) == ""
        taken = {entry.path for entry in planned(model).entries}
        assert not any(part in path.split(".") for part in dropped for path in taken)
        monkeypatch.setattr(targets, "refused_by_peft", lambda kind, path: False)
        found = unread_by_peft(config, planned(model))
        monkeypatch.undo()
        assert found.startswith("it renames the tensors of ") and found.endswith(", and drops them")
        assert f"mlp.{dropped[0]}" in found


def test_what_peft_refuses_is_given_in_its_words() -> None:
    model = tiny_model("llama")
    norms = replace(planned(model), entries=(replace(planned(model).entries[0], path="model.norm"),))
    assert "it refuses: " in unread_by_peft(model.config, norms, type(model))


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("llama", "float32", {}),
        ("llama", "bfloat16", {}),
        ("llama", "float32", {"variant": "dora"}),
        ("llama", "float32", {"new_tokens": ("<a>", "<b>")}),
        ("qwen2_moe", "float32", {}),
        ("glm4_moe", "bfloat16", {}),
        ("gpt2", "float32", {"target_modules": ("c_attn", "wpe")}),
        ("padded", "float32", {"new_tokens": ("<a>", "<b>")}),
    ],
)
def test_peft_s_logits_are_those_of_the_live_pairs(
    trained: Callable[..., TextModel], tmp_path: Path, family: str, dtype: str, settings: Any
) -> None:
    found = compare_with_peft(trained(family, dtype, **settings), "default", tmp_path / "adapter", ROWS)
    assert found.tokens == 34 and found.logit < 1e-5 and found.median == ("moe" in family)
    assert found.of_effect is not None and found.of_effect < 1e-4


def test_an_adapter_that_changes_nothing_is_not_measured_by_its_effect(
    trained: Callable[..., TextModel], tmp_path: Path
) -> None:
    text = trained("llama")
    with torch.no_grad():
        for name, parameter in trained_parameters(text.model).items():
            if name.endswith("B"):
                parameter.zero_()
    peft.write(adapter_of(text.model), tmp_path / "adapter")
    assert compare_with_peft(text, "default", tmp_path / "adapter", ROWS).of_effect is None


def test_why_it_is_not_compared(trained: Callable[..., TextModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = trained("llama")
    assert why_not_by_peft(text) == ""
    monkeypatch.setattr(by_peft, "LARGEST", 1 << 10)
    assert "in fp32, more than 1" in why_not_by_peft(text)
    packed = load_text_model(ModelSpec(path=str(tmp_path / "base"), quantize=QuantSpec(method="nf4")))
    assert why_not_by_peft(packed) == "PEFT has no pairs for the packed weights of this base"
    monkeypatch.setattr(by_peft, "peft_version", lambda: "")
    assert why_not_by_peft(text) == "PEFT is not installed"
