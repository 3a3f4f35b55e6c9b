"""What stays in memory under `memory.budget`: decided before anything is loaded, or refused with the least that works."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lorakeet.config import RunConfig
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.kernels.cache import cache_folder
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.budget import enough_for, gib_text, larger_than_machine, machine_bytes
from lorakeet.memory.cuda import gpu_warning, limit_gpu_memory
from lorakeet.memory.measure import resident_bytes
from lorakeet.memory.spill import HostSpill, Spill
from lorakeet.memory.transfer import STAGINGS
from lorakeet.models.files.source import bytes_to_unpack, find_source
from lorakeet.models.placement import device_for, dtype_for, planned_on, products_for
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import read_config
from lorakeet.workflows.planning.forecast_choices import decomposes, measures_rows
from lorakeet.workflows.planning.forecast_text_run import (
    ROW_BYTES,
    Planned,
    Precision,
    forecast_run,
    largest_rows,
    text_runtime_bytes,
)
from lorakeet.workflows.planning.rehearse_text import NotPlanned, Streaming
from lorakeet.workflows.planning.streaming import Batches, StreamingChoice, choose_streaming, least_streamed


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
    card: torch.device | None = None  # the CUDA device whose memory the budget bounds; None for that of the process
    pinned: bool = False  # whether blocks stay in the host's pinned memory once they were read
    most: int | None = None  # tokens of a row that a check compares, where longer rows have no room
    away: bool = False  # whether block inputs go from the card into the host's memory

    def spill(self) -> Spill:
        """A new place for the inputs of blocks."""
        return HostSpill() if self.away else Spill(self.scratch)

    def waiting(self) -> Spill:
        """A new place for tensors that wait to be written: on disk where blocks are."""
        return Spill(self.store)


@dataclass(frozen=True)
class Loaded:
    """What the process holds before the model: whether rows may have labels, and how many characters they have.

    Of a search also how many adapters are in training at once, and the pairs of the largest, where they are not the run's.
    """

    labelled: bool = True
    characters: int = 0
    members: int = 1
    lora: LoraSpec | None = None


def arrange(config: RunConfig, say: Callable[[str], None], loaded: Loaded | None = None) -> Arrangement:
    """Decides, says what was decided, and under a budget has freed memory given back from now on; on a CUDA device, whose memory
    the budget then bounds, torch is held to it.

    With `loaded`, which a run has, what it will hold is forecast whether there is a budget or not. Raises ConfigError where the
    budget cannot be kept, and EnvironmentProblem for a device on which nothing is streamed.
    """
    if loaded is not None and loaded.lora is not None:
        config = replace(config, lora=loaded.lora)
    budget, device = config.memory.bytes, device_for(config.model.device)
    if budget is None and (loaded is None or device.type != "cpu"):
        return Arrangement()
    if device.type not in ("cpu", "cuda"):
        raise EnvironmentProblem(
            f"memory.budget is kept on the CPU and on CUDA devices, but the model would be on {device}. Set model.device to cpu, "
            "or leave the budget out."
        )
    if budget is not None and device.type == "cpu":
        return_freed_memory()
        require_room_to_unpack(config.model, budget)
    source = find_source(config.model, say)
    model_config = read_config(source)
    if budget is None:
        planned = _forecast(config, model_config, source, loaded or Loaded(), say)
        return Arrangement(planned=None if planned is None else planned.training_peak, forecast=planned)
    card = device if device.type == "cuda" else None
    if warning := larger_than_machine(budget) if card is None else gpu_warning(card, budget):
        say(warning)
    if card is None and config.memory.keep == "host":
        say("memory.keep host is for CUDA devices. On the CPU, whose memory the budget bounds, blocks come from disk.")
    planned = _forecast(config, model_config, source, loaded or Loaded(), say)
    found = Arrangement(budget, None if planned is None else planned.training_peak, forecast=planned, card=card)
    if planned is not None and planned.peak <= budget:
        place = "in memory" if card is None else f"on {card}"
        say(f"Memory: {gib_text(planned.peak)} planned of {gib_text(budget)}; everything stays {place}.")
    else:
        found = _streamed(config, model_config, source, planned, loaded or Loaded(), say)
    if card is not None:
        limit_gpu_memory(card, budget)
    return found


def unplanned(error: NotPlanned) -> ConfigError:
    """What is said where there is a budget and no plan."""
    return ConfigError(f"memory.budget cannot be kept without a plan: {error} Leave the budget out.")


def require_room_to_unpack(spec: ModelSpec, budget: int) -> None:
    """Raises ConfigError where a .gguf file that is still to be unpacked takes more than the budget."""
    held = bytes_to_unpack(spec)
    needed = resident_bytes() + held
    if held and needed > budget:
        raise ConfigError(
            f"memory.budget is {budget >> 20} MiB, but unpacking {spec.path}, which is done once, takes about "
            f"{enough_for(needed)}. Raise the budget, or run once without it: later runs read the copy that stays."
        )


def _forecast(
    config: RunConfig, model_config: Any, source: Path, loaded: Loaded, say: Callable[[str], None]
) -> Planned | None:
    """What the run holds with every weight in memory; None, which is said, where the model cannot be planned so."""
    precision = precision_of(config)
    try:
        return forecast_run(
            config, model_config, precision, runtime=_runtime(config, precision, loaded), files=source,
            returning=config.memory.bytes is not None, labelled=loaded.labelled,
        ).searching(loaded.members)  # fmt: skip
    except NotPlanned as error:
        say(f"{error} How much memory the run takes with its weights in memory is not known before it has run.")
        return None


def _runtime(config: RunConfig, precision: Precision, loaded: Loaded) -> int:
    """What is held beside the tensors where the model is: on a CUDA device no row is."""
    rows = 0 if precision.on_card else ROW_BYTES * loaded.characters
    return text_runtime_bytes(precision, decomposing=decomposes(config)) + rows


def precision_of(config: RunConfig) -> Precision:
    """How the weights will be kept and multiplied: on a CUDA device if model.device says so, else on this machine's CPU."""
    device = planned_on(config.model.device)
    dtype = dtype_for(config.model.dtype, device)
    return Precision(dtype, products_for(config.model, dtype, device), config.model.quantize, device)


def _streamed(
    config: RunConfig, model_config: Any, source: Path, planned: Planned | None, loaded: Loaded, say: Callable[[str], None]
) -> Arrangement:
    budget, precision = config.memory.bytes or 0, precision_of(config)
    if refusal := not_streamed(config, None if planned is None else planned.peak):
        raise ConfigError(refusal)
    rehearsed, batches = streamed_plans(config, model_config, source, loaded), batches_of(config, model_config)
    try:
        choice = choose_streaming(rehearsed, batches, budget)
    except NotPlanned as error:
        raise unplanned(error) from error
    if choice is None:
        lowest = least_streamed(rehearsed)
        if planned is not None:
            lowest = min(lowest, planned.peak)
        what, more = ("this run", "") if loaded.members == 1 else ("this search", "--together, --rank-choices, ")
        several = f" and {loaded.members} adapters of rank {config.lora.rank} in training at once" if more else ""
        raise ConfigError(
            f"memory.budget is {budget >> 20} MiB, but {what} takes at least {enough_for(lowest)}, streamed or not, with "
            f"micro-batches of {largest_rows(config).tokens:,} tokens{several}. Raise the budget, or lower {more}lora.rank, "
            "data.max_tokens or train.micro_tokens."
        )
    how = streaming_text(choice, precision, config.memory.keep)
    say(f"Memory: {gib_text(choice.planned.peak)} planned of {gib_text(budget)}; {how}.")
    folder = Path(config.memory.store).expanduser() if config.memory.store else cache_folder() / "stores"
    found = Arrangement(
        budget, choice.planned.training_peak, folder, folder if choice.spill else None, choice.together, choice.slots,
        choice.planned,
    )  # fmt: skip
    if not precision.on_card:
        return found
    beside, said = beside_card(choice, batches, config.memory.keep)
    say(said)
    if beside > machine_bytes():
        raise ConfigError(
            f"{said} This machine has {gib_text(machine_bytes())}. Leave memory.keep out, so that blocks come from disk, or "
            "lower train.batch_size."
        )
    pinned = config.memory.keep == "host" and not choice.all_stay
    return replace(found, scratch=None, card=precision.device, pinned=pinned, away=choice.spill)


def streaming_text(choice: StreamingChoice, precision: Precision, keep: str = "disk") -> str:
    """The choice in words, on the device of `precision`, with blocks that come from where `keep` says."""
    memory = f"on {precision.device}" if precision.on_card else "in memory"
    away = "in the host's memory" if precision.on_card else "on disk"
    inputs = away if choice.spill else memory
    if choice.all_stay:
        return f"every frozen block stays {memory} and is computed again in the backward pass, its inputs kept {inputs}"
    source = "the host's pinned memory" if precision.on_card and keep == "host" else "disk"
    return (
        f"frozen blocks are streamed from {source}, {choice.slots} of {choice.planned.blocks} {memory}, {choice.together} "
        f"micro-batches at once, their inputs kept {inputs}"
    )


def beside_card(choice: StreamingChoice, batches: Batches, keep: str) -> tuple[int, str]:
    """What streaming to a CUDA device pins of the host's memory, in bytes and in words: torch takes powers of two for it."""
    pinned = keep == "host" and not choice.all_stay
    inputs = choice.together * choice.planned.blocks if choice.spill else 0
    blocks = choice.planned.blocks if pinned else STAGINGS
    size = blocks * _power(choice.planned.block_bytes) + inputs * _power(batches.state_bytes)
    what = f"the {choice.planned.blocks} frozen blocks" if pinned else f"{STAGINGS} buffers of a block"
    more = " and the inputs of blocks" if inputs else ""
    return size, f"Pinned of the host's memory: about {gib_text(size)}, {what}{more}, beside what Python and its libraries hold."


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def streamed_plans(
    config: RunConfig, model_config: Any, files: Path | None, loaded: Loaded
) -> Callable[[Streaming], Planned]:
    """What a streamed run holds, by the way in which it streams; each way is rehearsed once. Raises ConfigError where the model
    has no list of blocks.
    """
    precision = precision_of(config)
    runtime = _runtime(config, precision, loaded)

    @cache
    def plan(streaming: Streaming) -> Planned:
        return forecast_run(
            config, model_config, precision, runtime=runtime, files=files, returning=True, labelled=loaded.labelled,
            streaming=streaming,
        ).searching(loaded.members)  # fmt: skip

    return plan


def batches_of(config: RunConfig, model_config: Any) -> Batches:
    """The micro-batches of a step of rows as long as data.max_tokens allows."""
    rows, text = largest_rows(config), model_config.get_text_config()
    state = rows.tokens * int(text.hidden_size) * precision_of(config).dtype.itemsize
    return Batches(math.ceil(config.train.batch_size / rows.count), state)


def not_streamed(config: RunConfig, peak: int | None) -> str:
    """Why a run does not keep its budget by streaming, with the least that it takes; empty where it may.

    Pairs are cut, and rows measured, on a model in memory only.
    """
    measures = measures_rows(config)
    if config.ranks.choose != "prune" and not measures:
        return ""
    least = "" if peak is None else f" ({enough_for(peak)} or more)"
    said = (
        f"memory.budget is {(config.memory.bytes or 0) >> 20} MiB, which this run would keep by streaming its blocks, but "
    )
    if config.ranks.choose == "prune":
        return said + (
            f"ranks.choose is prune, which cuts pairs of a model in memory. Raise the budget{least}, lower lora.rank, or take "
            "ranks.choose given, whose ranks are those of lora.rank and lora.rank_pattern."
        )
    return said + (
        f"{measures} measures training rows on a model in memory. Raise the budget{least}, or choose the ranks in a run without "
        "it (--dry-run --json prints them) and give them in lora.rank_pattern, with lora.start kaiming."
    )
