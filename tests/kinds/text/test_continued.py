"""An adapter that is trained further gives its targets, ranks and alphas; one with more than pairs is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.formats.peft import peft
from lorakeet.kinds.text.continued import start_from, with_continued
from lorakeet.models.inject import trained_parameters
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model

QUERY, VALUE = (f"model.layers.{layer}.self_attn.{name}" for layer, name in ((0, "q_proj"), (1, "v_proj")))


def pair(rank: int, alpha: float, out: int = 64, into: int = 64) -> Pair:
    generator = torch.Generator().manual_seed(rank)
    return Pair(torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator), alpha)


def settings(folder: Path) -> RunConfig:
    return RunConfig(lora=LoraSpec(rank=16, target_modules=("mlp",), layers="top:1", continue_from=str(folder)))


def written(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir()
    peft.write(adapter, folder)
    return folder


def test_settings_become_those_of_the_adapter(tmp_path: Path) -> None:
    folder = written(Adapter({QUERY: pair(4, 8.0), VALUE: pair(2, 6.0)}, base="model"), tmp_path / "adapter")
    lora = with_continued(settings(folder)).lora
    ranks = {lora.rank, *lora.rank_pattern.values()}
    assert ranks == {2, 4} and {lora.alpha, *lora.alpha_pattern.values()} == {8.0, 6.0}
    assert set(lora.target_modules) == {QUERY, VALUE} and lora.layers == "all"
    assert with_continued(replace(settings(folder), lora=lora)).lora == lora  # as a resumed run reads them


def test_nothing_changes_without_one() -> None:
    assert with_continued(RunConfig()) == RunConfig()


def test_what_cannot_be_trained_further_is_named(tmp_path: Path) -> None:
    extras = {"lm_head.weight": torch.zeros(8, 64)}
    folder = written(Adapter({QUERY: pair(4, 8.0)}, extras, base="model"), tmp_path / "adapter")
    with pytest.raises(ConfigError, match="trained modules or token rows"):
        with_continued(settings(folder))


def test_the_pairs_start_with_the_adapters_values(tiny_llama_folder: Path) -> None:
    text = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32", device="cpu"))
    plan = plan_for(text.model, LoraSpec(rank=4, alpha=8.0, target_modules=("q_proj",)), text.family)
    text = initialise_adapter(text, plan, seed=0)
    shapes = {entry.path: entry.shape for entry in plan.entries}
    adapter = Adapter({path: pair(4, 8.0, *shape) for path, shape in shapes.items()})
    start_from(text, plan, adapter, "default")
    parameters = trained_parameters(text.model)
    for path, each in adapter.pairs.items():
        assert torch.equal(parameters[f"{path}.A"], each.A) and torch.equal(parameters[f"{path}.B"], each.B)
    other = Adapter({path: pair(2, 8.0, *shape) for path, shape in shapes.items()})
    with pytest.raises(ConfigError, match="differ at"):
        start_from(text, plan, other, "default")
