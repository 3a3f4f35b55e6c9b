"""Lorakeet on packed rows over random weights: the training of `lorakeet finetune` alone."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from harness.steps import StepLog, contender
from harness.workload import Workload

from contenders.packed_workload import lorakeet_on, rows_of
from lorakeet.train.loop import train
from lorakeet.train.progress import Record, Silent
from lorakeet.train.run import RunFolder


class Recorder(Silent):
    """Hands each step of the loop to the log."""

    def __init__(self, log: StepLog) -> None:
        self.log = log

    def begin(self, total: int, *, done: int) -> None:
        self.log.begin()

    def step(self, record: Record) -> None:
        self.log.step()
        self.log.losses.append(float(record["loss"] or 0))


def train_packed(workload: Workload, dtype: str, *, kernels: str = "torch") -> StepLog:
    """The workload's steps; SystemExit where they would have other rows."""
    ready, rows = lorakeet_on(workload, kernels), rows_of(workload)
    for number, step in enumerate(workload.steps):
        if tuple(rows[row] for row in ready.task.order.indices(number)) != step:
            raise SystemExit(f"Step {number + 1} has other rows than the workload.")
    text = ready.task.text
    log = StepLog(
        card=workload.device == "cuda",
        notes={
            "rows lie": "flat",
            "attention": text.attention,
            "products": str(text.products).removeprefix("torch."),
            "kernels": kernels,
        },
    )
    with TemporaryDirectory() as folder:
        train(ready.task, ready.config.train, run=RunFolder.create(Path(folder) / "run"), report=Recorder(log))
    return log


if __name__ == "__main__":
    contender(train_packed)
