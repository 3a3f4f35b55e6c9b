"""`planning.rehearsal_key`: what changes a rehearsal is in its key, and what does not is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from lorakeet.config import RunConfig, read_run
from lorakeet.planning.rehearsal_key import NO_SHAPES, model_key, rehearsal_key
from tiny.configs import SMALL


def config_of(**given: str) -> RunConfig:
    moved = {name.replace("__", "."): text for name, text in given.items()}
    return read_run(None, {"model.path": "m", "data.train": "r", **moved})


def model(**changed: Any) -> Any:
    return transformers.LlamaConfig(**{**SMALL, **changed})


@pytest.mark.parametrize("moved", [{"train__moments": "8bit"}, {"train__head_chunk": "7"}, {"model__attention": "sdpa"}])
def test_what_changes_shapes_changes_the_key(moved: dict[str, str]) -> None:
    before = rehearsal_key(config_of(), model(), None)
    assert repr(rehearsal_key(config_of(), model(), None)) == repr(before)
    assert repr(rehearsal_key(config_of(**moved), model(), None)) != repr(before)


def test_another_model_its_files_or_a_step_is_another_key(tmp_path: Path) -> None:
    before = rehearsal_key(config_of(), model(), tmp_path, 1)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    found = {repr(key) for key in (
        before, rehearsal_key(config_of(), model(num_hidden_layers=7), None, 1), rehearsal_key(config_of(), model(), tmp_path, 1),
        rehearsal_key(config_of(), model(), tmp_path, 2),
    )}  # fmt: skip
    assert len(found) == 4


def test_what_changes_no_shape_is_left_out() -> None:
    moved = config_of(train__epochs="9", train__learning_rate="0.5", train__batch_size="3", train__seed="8")
    assert repr(rehearsal_key(moved, model(), None)) == repr(rehearsal_key(config_of(), model(), None))
    assert {"epochs", "batch_size", "seed"} < set(NO_SHAPES) and "moments" not in NO_SHAPES


def test_training_is_no_part_of_the_key_of_a_model(tmp_path: Path) -> None:
    moved = config_of(train__moments="8bit", data__max_tokens="7")
    key = repr(model_key(config_of().model, model(), None, "nf4"))
    assert repr(model_key(moved.model, model(), None, "nf4")) == key
    others = [
        model_key(config_of().model, model(), None, "int8"), model_key(config_of().model, model(), tmp_path, "nf4"),
        model_key(config_of(model__attention="sdpa").model, model(), None, "nf4"),
        model_key(config_of().model, model(num_hidden_layers=7), None, "nf4"),
    ]  # fmt: skip
    assert len({key, *map(repr, others)}) == 5
