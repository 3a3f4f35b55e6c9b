"""Lorakeet: the training of `lorakeet finetune`, from the shipped run file, without the proof that follows it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from harness.steps import StepLog, contender
from harness.workload import Workload
from rich.console import Console

from contenders.quickstart_workload import quickstart
from lorakeet.train.loop import train
from lorakeet.train.progress import Record, Silent
from lorakeet.train.run import RunFolder
from lorakeet.train.text_task import TextTask
from lorakeet.workflows.assemble import assemble, ready_to_train


class Recorder(Silent):
    """Hands each step of the loop to the log."""

    def __init__(self, log: StepLog) -> None:
        self.log = log

    def begin(self, total: int, *, done: int) -> None:
        self.log.begin()

    def step(self, record: Record) -> None:
        self.log.step()
        self.log.losses.append(float(record["loss"] or 0))


def train_lorakeet(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps; SystemExit where this process would train on other ids than the workload holds."""
    steps = len(workload.steps)
    config = quickstart(steps=steps, seed=workload.seed, dtype=dtype, shuffled=workload.shuffled)
    setup = assemble(config, Console(stderr=True))
    task = ready_to_train(setup, held_out=())  # so that only training is timed
    _require_same_rows(task, workload)
    log = StepLog(
        notes={
            "weights": str(setup.text.dtype).removeprefix("torch."),
            "products": str(setup.text.products).removeprefix("torch."),
            "attention": setup.text.attention,
            "trained parameters": setup.plan.parameters,
        }
    )
    log.begin()  # the loop measures its own peak and resets the system's: what loading took is noted before
    with TemporaryDirectory() as folder:
        train(task, setup.config.train, run=RunFolder.create(Path(folder) / "run"), report=Recorder(log))
    return log


def _require_same_rows(task: TextTask, workload: Workload) -> None:
    for number, step in enumerate(workload.steps):
        ours = [
            (tuple(task.train[row].ids.tolist()), tuple(task.train[row].supervised.nonzero()[0].tolist()))
            for row in task.order.indices(number)
        ]
        if ours != [(row.ids, row.targets) for row in step]:
            raise SystemExit(f"Step {number + 1} has other rows than the workload.")


if __name__ == "__main__":
    contender(train_lorakeet)
