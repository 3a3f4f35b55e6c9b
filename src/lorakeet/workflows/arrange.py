"""What stays in memory under `memory.budget`: decided before anything is loaded, or refused with the least that works."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.budget import larger_than_machine
from lorakeet.models.gguf_copy import cache_folder
from lorakeet.models.load import read_config
from lorakeet.models.placement import device_for, dtype_for, products_for
from lorakeet.models.source import find_source
from lorakeet.train.rehearsal import NotPlanned, Streaming
from lorakeet.workflows.choose_streaming import Batches, Choice, choose_streaming, least_streamed
from lorakeet.workflows.forecast_run import ROW_BYTES, Planned, Precision, forecast_run, rows_of, runtime_bytes


@dataclass(frozen=True)
class Arrangement:
    """How a run keeps its budget, and what it is planned to hold. Without a budget nothing streams."""

    budget: int | None = None
    planned: int | None = None  # bytes until training ends
    store: Path | None = None  # the folder of the store, where blocks are streamed
    scratch: Path | None = None  # the folder for block inputs, where they are not kept in memory
    together: int = 0  # micro-batches that pass through a block while it is in; 0 for all
    slots: int = 2  # blocks in memory, where they are streamed
    forecast: Planned | None = None


@dataclass(frozen=True)
class Loaded:
    """What the process holds before the model: whether rows may have labels, and how many characters they have."""

    labelled: bool = True
    characters: int = 0


def arrange(config: RunConfig, say: Callable[[str], None], loaded: Loaded | None = None) -> Arrangement:
    """Decides, says what was decided, and under a budget has freed memory given back from now on.

    With `loaded`, which a run has, what it will hold is forecast whether there is a budget or not. Raises ConfigError where the
    budget cannot be kept, and EnvironmentProblem for a device on which nothing is streamed yet.
    """
    budget, device = config.memory.bytes, device_for(config.model.device)
    if budget is None and (loaded is None or device.type != "cpu"):
        return Arrangement()
    if device.type != "cpu":
        raise EnvironmentProblem(
            f"memory.budget is kept on the CPU only, but the model would be on {device}. Set model.device to cpu, or leave the "
            "budget out."
        )
    if budget is not None:
        if warning := larger_than_machine(budget):
            say(warning)
        return_freed_memory()
    source = find_source(config.model, say)
    model_config = read_config(source)
    planned = _forecast(config, model_config, source, loaded or Loaded(), say)
    if budget is None:
        return Arrangement(planned=None if planned is None else planned.training_peak, forecast=planned)
    if planned is not None and planned.peak <= budget:
        say(f"Memory: {_size(planned.peak)} planned of {_size(budget)}; everything stays in memory.")
        return Arrangement(budget, planned.training_peak, forecast=planned)
    return _streamed(config, model_config, source, planned, loaded or Loaded(), say)


def _forecast(
    config: RunConfig, model_config: Any, source: Path, loaded: Loaded, say: Callable[[str], None]
) -> Planned | None:
    """What the run holds with every weight in memory; None, which is said, where the model cannot be planned so."""
    precision = precision_of(config)
    try:
        return forecast_run(
            config, model_config, precision, runtime=runtime_bytes(precision) + ROW_BYTES * loaded.characters, files=source,
            returning=config.memory.bytes is not None, labelled=loaded.labelled,
        )  # fmt: skip
    except NotPlanned as error:
        say(f"{error} How much memory the run takes with its weights in memory is not known before it has run.")
        return None


def precision_of(config: RunConfig) -> Precision:
    """How the weights will be kept and multiplied on this machine's CPU."""
    device = torch.device("cpu")
    dtype = dtype_for(config.model.dtype, device)
    return Precision(dtype, products_for(config.model, dtype, device), config.model.quantize)


def _streamed(
    config: RunConfig, model_config: Any, source: Path, planned: Planned | None, loaded: Loaded, say: Callable[[str], None]
) -> Arrangement:
    budget = config.memory.bytes or 0
    rehearsed = streamed_plans(config, model_config, source, loaded)
    try:
        choice = choose_streaming(rehearsed, batches_of(config, model_config), budget)
    except NotPlanned as error:
        raise ConfigError(f"memory.budget cannot be kept without a plan: {error} Leave the budget out.") from error
    if choice is None:
        lowest = least_streamed(rehearsed)
        if planned is not None:
            lowest = min(lowest, planned.peak)
        raise ConfigError(
            f"memory.budget is {budget >> 20} MiB, but this run takes at least {-(-lowest >> 20)} MiB, streamed or not, with "
            f"micro-batches of {rows_of(config).tokens:,} tokens. Raise the budget, or lower lora.rank, data.max_tokens or "
            "train.micro_tokens."
        )
    say(f"Memory: {_size(choice.planned.peak)} planned of {_size(budget)}; {streaming_text(choice)}.")
    folder = Path(config.memory.store).expanduser() if config.memory.store else cache_folder() / "stores"
    return Arrangement(
        budget, choice.planned.training_peak, folder, folder if choice.aside else None, choice.together, choice.slots,
        choice.planned,
    )  # fmt: skip


def streaming_text(choice: Choice) -> str:
    """The choice in words."""
    inputs = "on disk" if choice.aside else "in memory"
    if choice.all_stay:
        return f"every frozen block stays in memory and is computed again in the backward pass, its inputs kept {inputs}"
    return (
        f"frozen blocks are streamed from disk, {choice.slots} of {choice.planned.blocks} in memory, {choice.together} "
        f"micro-batches at once, their inputs kept {inputs}"
    )


def streamed_plans(
    config: RunConfig, model_config: Any, files: Path | None, loaded: Loaded
) -> Callable[[Streaming], Planned]:
    """What a streamed run holds, by the way in which it streams; each way is rehearsed once. Raises ConfigError where the model
    has no list of blocks.
    """
    precision = precision_of(config)
    runtime = runtime_bytes(precision) + ROW_BYTES * loaded.characters

    @cache
    def plan(streaming: Streaming) -> Planned:
        return forecast_run(
            config, model_config, precision, runtime=runtime, files=files, returning=True, labelled=loaded.labelled,
            streaming=streaming,
        )  # fmt: skip

    return plan


def batches_of(config: RunConfig, model_config: Any) -> Batches:
    """The micro-batches of a step of rows as long as data.max_tokens allows."""
    rows, text = rows_of(config), model_config.get_text_config()
    state = rows.tokens * int(text.hidden_size) * precision_of(config).dtype.itemsize
    return Batches(math.ceil(config.train.batch_size / rows.count), state)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
