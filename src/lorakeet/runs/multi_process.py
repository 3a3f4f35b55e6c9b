"""A run that several processes train together: its limits, the device of each, what is said of one that dies besides training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from lorakeet.config import RunConfig
from lorakeet.errors import EnvironmentProblem, Problems, RunStopped
from lorakeet.models.placement import device_for, products_for, text_dtype_for
from lorakeet.train import checkpoint
from lorakeet.train.launch import Launch
from lorakeet.train.loop import Outcome, kept_text
from lorakeet.train.processes import Processes, ProcessLost
from lorakeet.train.run import RunFolder


def require_combinable(config: RunConfig, launch: Launch, *, several: bool = True) -> None:
    """Raises ConfigError that names every setting which several processes cannot share; `several`: the kind of run can be."""
    if launch.count == 1:
        return
    problems = Problems(f"{launch.count} processes cannot train this run together")
    alone = f"Leave it out, or start one process (not {launch.count})."
    if not several:
        problems.add(
            f"kind is {config.kind}, which one process trains. Start lorakeet without torchrun (not {launch.count} processes)."
        )
    if config.memory.budget:
        problems.add(f"memory.budget is {config.memory.budget}, which one process keeps by streaming its blocks. {alone}")
    if config.train.keep_prefix_states:
        problems.add(f"train.keep_prefix_states is on, which keeps the states of rows for one process. {alone}")
    if config.ranks.choose == "prune":
        problems.add(f"ranks.choose is prune, which one process does. Take auto, or start one process (not {launch.count}).")
    if config.train.shard and config.lora.variant == "dora":
        problems.add("train.shard is on, and lora.variant dora measures whole weights. Leave one of them out.")
    if config.train.batch_size < launch.count:
        rows = f"train.batch_size is {config.train.batch_size}, fewer than {launch.count} processes"
        problems.add(f"{rows}, so that some would never see a row. Give {launch.count} or more.")
    if config.model.device == "mps":
        problems.add("model.device is mps, and torch brings several processes together on cpu and cuda only. Use cpu.")
    problems.raise_if_any()


def on_own_device(config: RunConfig, processes: Processes) -> RunConfig:
    """The settings with the device of this process, and the precision that suits the first one's machine.

    Process i of a machine computes on its CUDA device i. Raises EnvironmentProblem where there are fewer of them.
    """
    launch, requested = processes.launch, config.model.device
    if launch.count == 1:
        return config
    device = torch.device("cpu")
    if requested.startswith("cuda") or (requested == "auto" and torch.cuda.is_available()):
        if torch.cuda.device_count() < launch.local_count:
            raise EnvironmentProblem(
                f"{launch.local_count} processes were started on a machine where torch sees {torch.cuda.device_count()} CUDA "
                f"devices. Start as many as there are (torchrun --nproc-per-node), or set model.device to cpu."
            )
        device = device_for(f"cuda:{launch.local_rank}")
        torch.cuda.set_device(device)
    elif requested != "auto":
        device = device_for(requested)
    model = replace(config.model, device=str(device))

    def chosen() -> tuple[str, str]:
        dtype = text_dtype_for(model.dtype, device)
        return str(dtype).removeprefix("torch."), str(products_for(model, dtype, device)).removeprefix("torch.")

    dtype, products = processes.from_first(chosen)  # what is fastest is measured, and may differ from one to the other
    return config.changed(model={"device": str(device), "dtype": dtype, "products": products})


@contextmanager
def starting_together(run: RunFolder) -> Iterator[None]:
    """A context in which a process that is gone before the first step is named with the way to go on; `train` does it later."""
    try:
        yield
    except ProcessLost as lost:
        again = f"Resume with: {run.resume_command}" if run.config.exists() else "Nothing was written. Start the run again."
        raise RunStopped(f"Before training: {lost}. {again}") from lost


@contextmanager
def evaluating_together(processes: Processes, run: RunFolder, outcome: Outcome) -> Iterator[None]:
    """A context for all that is computed after training: a process that is gone is named as `train` names it."""
    try:
        with processes.terminable(), processes.gathering():
            yield
    except ProcessLost as lost:
        last = run.checkpoints / checkpoint.step_name(outcome.steps)
        kept = kept_text(last, run.adapter, outcome.best_loss, outcome.best_step)
        raise RunStopped(
            f"After step {outcome.steps}, before the run was evaluated to the end: {lost}. {kept} "
            f"Resume with: {run.resume_command}"
        ) from lost
