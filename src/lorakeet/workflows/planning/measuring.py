"""How measuring a finished adapter keeps memory.budget: its base whole in memory or streamed; cutting it: whole, or refused.

Planned is what is really held: the base as it is loaded, the adapter as it was read and again on the model, rows and texts as the
judgement takes them, and for `compress` a backward pass over the pairs and every cut beside it. No step, no moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter
from lorakeet.core.plan import Plan
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.kernels.cache import cache_folder
from lorakeet.kernels.device import standing_for
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.budget import enough_for, gib_text, larger_than_machine, machine_bytes
from lorakeet.memory.cuda import allocated_bytes, gpu_warning, limit_gpu_memory, phases_on_gpu
from lorakeet.memory.forecast import phases_of
from lorakeet.memory.usage import Usage, add_usage, larger_usage
from lorakeet.models.files.source import find_source
from lorakeet.models.fits import plan_of
from lorakeet.models.placement import device_for
from lorakeet.models.streaming.load import empty_model
from lorakeet.models.text.from_config import model_from_config
from lorakeet.models.text.load import read_config
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.streamed_from_config import streamed_model_from_config
from lorakeet.workflows.planning.forecast_choices import VALUE
from lorakeet.workflows.planning.forecast_text_run import (
    FLOORS,
    INTERVALS,
    LOAD,
    ROW_BYTES,
    TOKENIZER_ENTRY,
    build_of,
    judging_of,
    load_peak,
    text_runtime_bytes,
)
from lorakeet.workflows.planning.rehearse_text import BEGIN, JUDGE, STEP, NotPlanned, Rehearsal, rehearse_judging
from lorakeet.workflows.planning.streaming import ALONE, FEWEST
from lorakeet.workflows.planning.text_run import Arrangement, Loaded, precision_of, require_room_to_unpack, unplanned

Weigh = Callable[[TextModel], object]


@dataclass(frozen=True)
class _Found:
    peak: int
    blocks: int
    block_bytes: int


def arrange_judging(config: RunConfig, adapter: Adapter, say: Callable[[str], None], loaded: Loaded) -> Arrangement:
    """How a measurement of `adapter` keeps memory.budget, which is said; nothing is arranged where there is none.

    Raises ConfigError with the least that works, EnvironmentProblem for a device on which nothing is streamed.
    """
    room = _Room.of(config, adapter, say, loaded)
    if room is None:
        return Arrangement()
    budget = room.budget
    try:
        slots, whole = FEWEST, room.forecast()
        found = whole if whole.peak <= budget else room.forecast(slots)
        if found.peak > budget:
            slots, found = ALONE, room.forecast(ALONE)
    except NotPlanned as error:
        raise unplanned(error) from error
    if found.peak > budget:
        raise ConfigError(
            f"memory.budget is {budget >> 20} MiB, but measuring this adapter takes at least "
            f"{enough_for(min(whole.peak, found.peak))}, with its base streamed block by block ({enough_for(whole.peak)} with it "
            "in memory). Give that with --memory, or lower train.micro_tokens, data.max_tokens (longer rows are left out) or "
            "evaluate.drift_tokens in its run file."
        )
    return room.arranged(whole, found, slots)


def arrange_cutting(
    config: RunConfig, adapter: Adapter, say: Callable[[str], None], loaded: Loaded, *, weigh: Weigh, copies: float
) -> Arrangement:
    """The same for `compress`, whose base is not streamed: `weigh` is its pass over rows, `copies` what it holds of the adapter
    beside the one on the model.
    """
    room = _Room.of(config, adapter, say, loaded)
    if room is None:
        return Arrangement()
    try:
        whole = replace(room, weigh=weigh, copies=copies).forecast()
    except NotPlanned as error:
        raise unplanned(error) from error
    if whole.peak > room.budget:
        raise ConfigError(
            f"memory.budget is {room.budget >> 20} MiB, but compressing this adapter takes {enough_for(whole.peak)}: its pairs "
            "are weighed by a backward pass over a base in memory, which is not streamed. Give that with --memory, or lower "
            "train.micro_tokens or data.max_tokens (longer rows are left out) in its run file."
        )
    return room.arranged(whole, whole, FEWEST)


@dataclass(frozen=True)
class _Room:
    config: RunConfig
    model_config: Any
    source: Path
    plan: Plan
    ids: tuple[int, ...]  # of trained token rows
    budget: int
    loaded: Loaded
    say: Callable[[str], None]
    weigh: Weigh | None = None
    copies: float = 1.0  # of the adapter, beside the one on the model

    @classmethod
    def of(cls, config: RunConfig, adapter: Adapter, say: Callable[[str], None], loaded: Loaded) -> _Room | None:
        """None without a budget; with one, freed memory goes back from now on, and what is wrong with it is said."""
        budget, device = config.memory.bytes, device_for(config.model.device)
        if budget is None:
            return None
        if device.type not in ("cpu", "cuda"):
            raise EnvironmentProblem(
                f"memory.budget is kept on the CPU and on CUDA devices, but the model would be on {device}. Set model.device to "
                "cpu, or leave the budget out."
            )
        if device.type == "cpu":
            return_freed_memory()
            require_room_to_unpack(config.model, budget)
        if warning := larger_than_machine(budget) if device.type == "cpu" else gpu_warning(device, budget):
            say(warning)
        source = find_source(config.model, say)
        model_config = read_config(source)
        plan = plan_of(empty_model(model_config, torch.float32), adapter)
        return cls(config, model_config, source, plan, adapter.token_ids, budget, loaded, say)

    def forecast(self, slots: int | None = None) -> _Found:
        """With `slots` blocks in memory, or left out with all of the base."""
        config, precision = self.config, precision_of(self.config)
        found = self._rehearsed(slots)
        own = VALUE * self.plan.parameters
        kept = add_usage(Usage(), base=found.base, adapter=own)
        floors = FLOORS if self.loaded.labelled and config.evaluate.baselines and not precision.on_card else 0
        read = round(self.copies * own)  # as values; a card has none of them, but the cut that is measured
        cut = own if precision.on_card and self.weigh is not None else 0
        intervals = 0 if precision.on_card else INTERVALS
        held = {
            LOAD: load_peak(self.model_config, found, precision),
            BEGIN: found.peaks[BEGIN],
            STEP: found.peaks.get(STEP, Usage()),
            JUDGE: add_usage(larger_usage(found.peaks[JUDGE], add_usage(kept, scratch=intervals)), adapter=cut, runtime=floors),
        }
        if precision.on_card:
            phases = phases_on_gpu(held, text_runtime_bytes(precision))
            block_bytes = allocated_bytes(found.block_bytes) if found.blocks else 0
        else:
            words = TOKENIZER_ENTRY * int(self.model_config.get_text_config().vocab_size) + ROW_BYTES * self.loaded.characters
            held = {name: add_usage(peak, adapter=read) for name, peak in held.items()}
            phases = phases_of(held, text_runtime_bytes(precision, decomposing=self.weigh is not None) + words, returning=True)
            block_bytes = found.block_bytes
        return _Found(max(phase.bytes for phase in phases), found.blocks, block_bytes)

    def _rehearsed(self, slots: int | None) -> Rehearsal:
        precision = precision_of(self.config)
        make = model_from_config if slots is None else partial(streamed_model_from_config, slots=slots)
        build = build_of(make, self.config, self.model_config, precision, self.source)
        with standing_for(precision.device):
            return rehearse_judging(build, self.plan, judging_of(self.config), token_ids=self.ids, weigh=self.weigh)

    def arranged(self, whole: _Found, found: _Found, slots: int) -> Arrangement:
        """The arrangement of a measurement that fits, which is said; on a CUDA device torch is held to the budget."""
        budget, precision = self.budget, precision_of(self.config)
        card = precision.device if precision.on_card else None
        place = "in memory" if card is None else f"on {card}"
        if whole.peak <= budget:
            self.say(f"Memory: {gib_text(whole.peak)} planned of {gib_text(budget)}; everything stays {place}.")
            result = Arrangement(budget, whole.peak, card=card)
        else:
            more = min(found.blocks - slots, (budget - found.peak) // found.block_bytes) if slots != ALONE else 0
            planned, slots = found.peak + more * found.block_bytes, slots + more
            memory = self.config.memory
            pinned = card is not None and memory.keep == "host" and slots < found.blocks
            if pinned and found.blocks * found.block_bytes > machine_bytes():
                raise ConfigError(
                    f"memory.keep host would pin about {gib_text(found.blocks * found.block_bytes)} of this machine's "
                    f"{gib_text(machine_bytes())}. Leave memory.keep out, so that blocks come from disk."
                )
            where = "the host's pinned memory" if pinned else "disk"
            self.say(
                f"Memory: {gib_text(planned)} planned of {gib_text(budget)}; frozen blocks are streamed from {where}, {slots} of "
                f"{found.blocks} {place}."
            )
            folder = Path(memory.store).expanduser() if memory.store else cache_folder() / "stores"
            result = Arrangement(budget, planned, folder, slots=slots, card=card, pinned=pinned)
        if card is not None:
            limit_gpu_memory(card, budget)
        return result
