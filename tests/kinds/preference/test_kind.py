"""The kind of preference runs: what it refuses early, and which model its reference is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import ConfigError, LorakeetError
from lorakeet.kinds.preference.kind import KIND, PreferenceRunKind
from lorakeet.kinds.protocol import run_kind
from lorakeet.kinds.text.kind import TextRunKind


def settings(**changes: Any) -> RunConfig:
    given = {"train.objective": "dpo", "model.path": "folder", "data.train": "rows.jsonl"}
    return read_run(None, {**given, **{key.replace("__", "."): str(value) for key, value in changes.items()}})


def test_the_objective_chooses_the_kind() -> None:
    assert isinstance(run_kind(settings()), PreferenceRunKind)
    assert type(run_kind(RunConfig())) is TextRunKind


def test_learning_rates_are_not_tried_by_another_loss() -> None:
    assert not KIND.tries_rates


@pytest.mark.parametrize(
    ("changes", "processes", "said"),
    [
        ({"train__shard": True}, 2, "train.shard is true"),
        ({"evaluate__encoder": "folder"}, 1, "evaluate.encoder"),
        ({"train__reference": "/nowhere"}, 1, "The reference /nowhere does not exist"),
    ],
)
def test_what_cannot_be_used_is_refused_before_a_model_is_loaded(changes: dict[str, Any], processes: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KIND.check(settings(**changes), processes)
    assert said in str(caught.value)


def test_a_reference_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LorakeetError, match=str(tmp_path)):
        KIND.check(settings(train__reference=tmp_path), 1)
