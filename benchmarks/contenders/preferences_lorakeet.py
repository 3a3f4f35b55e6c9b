"""Lorakeet's steps of preference_vs_trl: the reference once, then the training loop of `lorakeet finetune`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
from harness.steps import StepLog, installed, peak_bytes

from contenders.timed_step import answer
from contenders.with_lorakeet import StepRecorder
from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.formats.detect import read_adapter
from lorakeet.kinds.preference.spec import PreferenceSpec
from lorakeet.kinds.preference.task import PreferenceTask, Reference
from lorakeet.kinds.text.continued import start_from
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.train.loop import train
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec

PACKAGES = ("torch", "transformers", "lorakeet")


def measured(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and loss of each step, the seconds of the reference, the peak, and the tokens that a step has and computes."""
    text = load_text_model(ModelSpec(path=asked["model"], dtype=asked["dtype"]))
    lora = LoraSpec(rank=asked["rank"], alpha=asked["alpha"])
    plan = plan_for(text.model, lora, text.family)
    text = initialise_adapter(text, plan, seed=0)
    start_from(text, plan, read_adapter(Path(asked["adapter"])), "default")
    steps, pairs = asked["steps"], len(asked["steps"][0])
    spec = TrainSpec(
        objective=asked["objective"], steps=len(steps), batch_size=pairs, learning_rate=asked["learning_rate"],
        schedule="constant", warmup_fraction=0.0, patience=0, checkpoint_every=len(steps),
    )  # fmt: skip
    task = PreferenceTask(
        text, [row for step in steps for pair in step for row in examples(pair)], held_out=(), spec=spec,
        preference=PreferenceSpec(beta=asked["beta"]).resolved(asked["objective"]),
        desirable=([bool(pair.get("wanted")) for step in asked["steps"] for pair in step], []),
    )  # fmt: skip
    order: Any = SimpleNamespace(
        indices=lambda step: list(range(step * pairs, (step + 1) * pairs)), steps_per_epoch=len(steps)
    )
    task.order, task.steps_per_epoch = order, len(steps)
    started = time.perf_counter()
    if asked["objective"] not in ("orpo", "simpo"):
        task.reference = Reference(task.log_probs(task.train)[0], np.zeros(0), spec.micro_tokens)
    before, log = time.perf_counter() - started, StepLog()
    with TemporaryDirectory() as folder:
        train(task, spec, run=RunFolder.create(Path(folder) / "run"), report=StepRecorder(log))
    batches = task.batches(0)
    return {
        "seconds": log.seconds, "losses": log.losses, "seconds_of_reference": before,
        "peak_bytes": max(log.loaded_bytes, peak_bytes()), "packages": installed(PACKAGES),
        "tokens": [sum(len(row.ids) for pair in step for row in examples(pair)) for step in steps],
        "computed": sum(len(task.text.layout(batch).ids) for batch in batches),
    }  # fmt: skip


def examples(pair: Mapping[str, list[int]]) -> list[Example]:
    """The pair with its chosen and its rejected answer."""
    found = []
    for name in ("chosen_ids", "rejected_ids"):
        ids = np.array([*pair["prompt_ids"], *pair[name]], np.int64)
        found.append(Example(ids, np.arange(len(ids)) >= len(pair["prompt_ids"]), name, None, False))
    return found


if __name__ == "__main__":
    answer(measured)
