"""Lorakeet on packed rows over random weights: the training of `lorakeet finetune` alone."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from harness.steps import StepLog, contender
from harness.workload import Workload

from contenders.packed_workload import lorakeet_on
from contenders.with_lorakeet import StepRecorder, require_same_rows
from lorakeet.train.loop import train
from lorakeet.train.run import RunFolder


def train_packed(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps; SystemExit where they would have other rows."""
    ready = lorakeet_on(workload, dtype=dtype)
    require_same_rows(ready.task, workload)
    text = ready.task.text
    log = StepLog(
        gpu=workload.device == "cuda",
        notes={
            "rows lie": "flat",
            "attention": text.attention,
            "products": str(text.products).removeprefix("torch."),
        },
    )
    with TemporaryDirectory() as folder:
        train(ready.task, ready.config.train, run=RunFolder.create(Path(folder) / "run"), report=StepRecorder(log))
    return log


if __name__ == "__main__":
    contender(train_packed)
