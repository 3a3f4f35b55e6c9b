"""Which model the reference is, and which evaluator an objective has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakeet.config import RunConfig
from lorakeet.core.spec import LoraSpec
from lorakeet.formats.peft import peft
from lorakeet.kinds.preference.evaluate import (
    PreferenceEvaluator,
    _Scored,
    as_reference,
    reference_adapter,
    reference_path,
)
from lorakeet.kinds.preference.kind import KIND
from lorakeet.kinds.protocol import run_kind
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.models.inject import adapter_names, adapter_of
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model


def settings(objective: str = "dpo", reference: str = "start", earlier: str | None = None) -> RunConfig:
    return RunConfig(lora=LoraSpec(continue_from=earlier)).changed(train={"objective": objective, "reference": reference})


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (settings(), None),
        (settings(earlier="runs/sft"), Path("runs/sft")),
        (settings(reference="base", earlier="runs/sft"), None),
        (settings(reference="runs/other", earlier="runs/sft"), Path("runs/other")),
        (settings("orpo", earlier="runs/sft"), None),
    ],
)
def test_the_reference_is_where_training_starts_unless_another_is_named(config: RunConfig, path: Path | None) -> None:
    assert reference_path(config) == path


def test_the_evaluator_of_an_objective() -> None:
    found: Any = KIND.evaluator(None)
    assert run_kind(RunConfig()).evaluator(None) is TextEvaluator and found.func is PreferenceEvaluator


@pytest.mark.parametrize(("objective", "against"), [("orpo", "the base"), ("simpo", "the base"), ("dpo", "the reference")])
def test_pairs_are_compared_by_length_as_in_training_and_with_a_base_or_a_reference(objective: str, against: str) -> None:
    log_probs = np.array([-2.0, -3.0, -2.0, -3.0])
    texts, base, tokens = [("a", "bb"), ("aaa", "b")], log_probs - 1, np.full(4, 2.0)
    scored = _Scored(settings(objective), log_probs, base, base, tokens, texts, None, False)
    found = scored.preferences([("a", "bbb"), ("a", "bb")])
    assert found.against == against and found.rivals[1].system == "shorter answer"
    assert found.rivals[1].scores.tolist() == [1.0, -2.0] and found.rivals[1].note.endswith("as in 2 of 2 training pairs")


def test_a_named_reference_is_on_the_model_only_while_it_computes(tiny_llama_folder: Path, tmp_path: Path) -> None:
    text = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32", device="cpu", attention="eager"))
    text = initialise_adapter(text, plan_for(text.model, LoraSpec(rank=2, start="pissa"), text.family), seed=0)
    folder = tmp_path / "adapter"
    folder.mkdir()
    peft.write(adapter_of(text.model, base="model"), folder)
    held = reference_adapter(settings(reference=str(folder)))
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        live = text.model(input_ids=ids).logits
        with as_reference(text, None, "default"):
            base = text.model(input_ids=ids).logits
        with as_reference(text, held, "default"):
            assert adapter_names(text.model) == ["default", "reference"]
            named = text.model(input_ids=ids).logits
        again = text.model(input_ids=ids).logits
    assert adapter_names(text.model) == ["default"] and torch.equal(live, again)
    torch.testing.assert_close(named, live)
    assert base.shape == live.shape
