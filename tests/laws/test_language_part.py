"""A wrapper whose head belongs to one of its parts is refused with a remedy, and the remedy works."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import EnvironmentProblem
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from tiny.family_columns import in_transformers, saved
from tiny.models import tiny_tokenizer


@pytest.mark.slow
def test_the_language_part_of_a_wrapper_without_a_head_is_a_model(tmp_path: Path) -> None:
    folder, part = saved("nemotron_h_omni", tmp_path), tmp_path / "part"
    with pytest.raises(EnvironmentProblem, match=r"no output layer .* Its part language_model has one"):
        load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu"))
    in_transformers(folder).language_model.save_pretrained(part)
    tiny_tokenizer().save_pretrained(part)
    assert load_text_model(ModelSpec(path=str(part), dtype="float32", device="cpu")).model.config.model_type == "nemotron_h"
