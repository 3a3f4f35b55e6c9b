"""Lorakeet: the training of `lorakeet finetune`, from the shipped run file, without the proof that follows it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from lorakeet.memory.import_cost import without_triton

with without_triton():  # as a command, which is within it all the time
    from harness.steps import StepLog, contender
    from harness.workload import Workload
    from rich.console import Console

    from contenders.quickstart_workload import first_rows, quickstart
    from lorakeet.data.chat import Example
    from lorakeet.formats.peft import peft
    from lorakeet.kinds.text.assemble import TextAssembly, assemble_text, text_task
    from lorakeet.models.inject import adapter_of
    from lorakeet.models.text.cached_states import cached_states
    from lorakeet.train.loop import train
    from lorakeet.train.progress import Record, Reporter
    from lorakeet.train.run import RunFolder
    from lorakeet.train.text.task import TextTask


class StepRecorder(Reporter):
    """Hands each step of the loop to the log."""

    def __init__(self, log: StepLog) -> None:
        self.log = log

    def begin(self, total: int, *, done: int) -> None:
        self.log.begin()

    def step(self, record: Record) -> None:
        self.log.step()
        self.log.losses.append(float(record["loss"] or 0))


class Recorder(StepRecorder):
    """Now and then writes the adapter, too."""

    def __init__(self, log: StepLog, workload: Workload, setup: TextAssembly, task: TextTask, beside: Sequence[Example]) -> None:
        """`beside` are rows that are neither trained on nor evaluated."""
        super().__init__(log)
        self.workload, self.setup, self.task, self.beside = workload, setup, task, beside

    def step(self, record: Record) -> None:
        super().step(record)
        self.log.save_adapter(self.workload, self._write)

    def _write(self, folder: Path) -> None:
        text = self.setup.text
        peft.write(adapter_of(text.model, base=str(text.source)), folder)


def train_lorakeet(
    workload: Workload, dtype: str, *, layers: str = "all", shares_prefix: bool = True, in_int8: bool = False,
    recorder: type[Recorder] = Recorder, rows_beside: int = 0,
) -> StepLog:  # fmt: skip
    """The workload's steps; SystemExit where this process would train on other ids than the workload holds.

    With adapters in some `layers` only, what the blocks below make of the rows is kept where rows come again. `in_int8`:
    frozen weights are in int8 and multiply so. `recorder` may do more after a step than record it, with so many `rows_beside`.
    """
    steps = len(workload.steps)
    flags = {"lora.layers": layers, "train.batch_size": str(workload.batch_size)}
    if in_int8:
        flags |= {"model.quantize.method": "int8", "model.quantize.int8_products": "true"}
    config = quickstart(
        steps=steps, seed=workload.seed, dtype=dtype, shuffled=workload.shuffled, instructed=workload.instructed, flags=flags
    )
    whole = assemble_text(config, Console(stderr=True))
    setup = first_rows(whole, workload.training_rows)
    beside = whole.train.examples[len(setup.train.examples) :][:rows_beside]
    if len(beside) < rows_beside:
        raise SystemExit(f"{len(beside)} rows are left beside those of the training, and {rows_beside} are wanted.")
    task = text_task(setup, held_out=())  # so that only training is timed
    require_same_rows(task, workload)
    if not shares_prefix:
        task.text = task.text.with_options(share_prefix=False)
    log = StepLog(
        notes={
            "weights": str(setup.text.dtype).removeprefix("torch."),
            "products": str(setup.text.products).removeprefix("torch."),
            "attention": setup.text.attention,
            "trained parameters": setup.plan.parameters,
        }
    )
    log.begin()  # the loop measures its own peak and resets the system's: what loading took is noted before
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        if layers != "all" and steps >= 2 * task.steps_per_epoch:  # as verbs/finetune decides
            kept = cached_states(setup.text, task.train, folder=folder, micro_tokens=setup.config.train.micro_tokens)
            log.notes["bytes of kept states"] = stack.enter_context(kept).bytes
            log.before = time.perf_counter() - log.last
        train(task, setup.config.train, run=RunFolder.create(folder / "run"), report=recorder(log, workload, setup, task, beside))
    return log


def require_same_rows(task: TextTask, workload: Workload) -> None:
    """SystemExit where a step of the task has other rows than the workload's."""
    for number, step in enumerate(workload.steps):
        ours = [
            (tuple(task.train[row].ids.tolist()), tuple(task.train[row].supervised.nonzero()[0].tolist()))
            for row in task.order.indices(number)
        ]
        if ours != [(row.ids, row.targets) for row in step]:
            raise SystemExit(f"Step {number + 1} has other rows than the workload.")


if __name__ == "__main__":
    contender(
        train_lorakeet,
        unshared=partial(train_lorakeet, shares_prefix=False),  # which no setting turns off
        top8=partial(train_lorakeet, layers="top:8"),
        int8=partial(train_lorakeet, in_int8=True),
    )
