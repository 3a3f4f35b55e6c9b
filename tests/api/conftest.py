"""One run that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import lorakeet as lk
from tiny.runs import reviews

SETTINGS: dict[str, Any] = {
    "lora": lk.Lora(rank=4, alpha=12),
    "train": lk.Train(steps=6, batch_size=8, learning_rate=0.02),
    "evaluate": lk.Evaluate(resamples=200, drift_texts=4, drift_tokens=8, answers=4, answer_tokens=8, examples=2),
}


@dataclass
class Shared:
    """A finished run, the model that it was given, and what its callbacks were called with."""

    run: lk.Run
    model: lk.Model
    rows: Any
    steps: list[Any] = field(default_factory=list)
    evaluations: list[Any] = field(default_factory=list)


@pytest.fixture(scope="session")
def shared(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """A run on records in memory over the tiny Llama, in fp32. Do not write into it."""
    place = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKEET_CACHE", str(place / "cache"))
        model = lk.load(tiny_llama_folder, dtype="float32")
        rows = lk.rows(reviews(60), held_out=0.3, max_tokens=120)
        steps: list[Any] = []
        evaluations: list[Any] = []
        run = lk.finetune(
            model, rows, out=place / "mine", quiet=True, on_step=steps.append, on_held_out=evaluations.append, **SETTINGS
        )
        yield Shared(run, model, rows, steps, evaluations)
        model.release()
        run.model.release()
