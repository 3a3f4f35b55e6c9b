"""Masks by kind of layer: the numbers are those of a mask of ones, for rows shorter and longer than a window."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.errors import EnvironmentProblem
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.row_masks import recurrent_kinds
from tiny.family_columns import saved

ROWS = (13, 4, 9)  # tokens; lfm3's window is 8
HYBRIDS = {"qwen3_5_text": "linear_attention", "lfm2": "conv", "lfm3": "conv", "falcon_h1": "hybrid", "zaya": "hybrid"}


def examples() -> list[Example]:
    draw = np.random.default_rng(0)
    return [Example(draw.integers(4, 300, size=n), np.arange(n) > 0, str(n), None, False) for n in ROWS]


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_states_are_those_with_a_mask_of_ones(family: str, attention: str, tmp_path: Path) -> None:
    text = load_text_model(ModelSpec(path=str(saved(family, tmp_path)), dtype="float32", device="cpu", attention=attention))
    batch = pack_examples(examples())
    assert text.masks_by_kind and HYBRIDS[family] in recurrent_kinds(text.model.config)
    with torch.no_grad():
        assert torch.equal(text.hidden(batch), replace(text, masks_by_kind=False).hidden(batch))


def test_a_model_that_takes_one_mask_keeps_it(tmp_path: Path) -> None:
    text = load_text_model(ModelSpec(path=str(saved("mamba2", tmp_path)), dtype="float32", device="cpu"))
    assert recurrent_kinds(text.model.config) and not text.masks_by_kind


@pytest.mark.parametrize("family", ["falcon_h1", "recurrent_gemma"])
def test_rows_of_recurrent_layers_are_never_packed(family: str, tmp_path: Path) -> None:
    """In bf16 the check of the logits took what leaks from a tiny model's first row into its second for rounding."""
    spec = ModelSpec(path=str(saved(family, tmp_path)), dtype="bfloat16", device="cpu")
    text = load_text_model(spec)
    assert text.attention == "sdpa" and "pass states on from row to row" in text.why_not_varlen
    with pytest.raises(EnvironmentProblem, match=f"'{family}' models would pass states on from row to row"):
        load_text_model(replace(spec, attention="varlen"))
