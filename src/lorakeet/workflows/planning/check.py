"""How the check of a merged or exported model keeps a memory budget: its models whole in fp32, or streamed, or refused.

A check compares what base + adapter compute with what the artefact computes. Its phases, each with a peak of its own:

    load       a model is read, or goes block by block into its store
    weights    every stored tensor against the one it should be
    ask        where models are streamed: llama.cpp computes, and what it says waits on disk
    compare    both compute; of streamed models one after the other, what the first says or makes of the batches waiting on disk
    intervals  of what was found, once no model computes
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorakeet.core.adapter import Adapter
from lorakeet.core.plan import Plan
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.evaluate.parity import CELLS
from lorakeet.evaluate.wording import bytes_text
from lorakeet.export.compare_stored import PART_BYTES
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.budget import enough_for, larger_than_machine
from lorakeet.memory.forecast import Phase, phases_of
from lorakeet.memory.usage import Usage, add_usage
from lorakeet.models.families import family_of
from lorakeet.models.files.source import find_source
from lorakeet.models.files.stored_tensors import stored_dtype
from lorakeet.models.fits import plan_of
from lorakeet.models.generate.sample import spilled_bytes
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import bytes_of_storing, empty_model
from lorakeet.models.text.from_config import model_from_config
from lorakeet.models.text.load import read_config
from lorakeet.models.text.repeated_blocks import ModelBuilder
from lorakeet.models.text.streamed_from_config import streamed_model_from_config
from lorakeet.workflows.planning.forecast_text_run import INTERVALS, TOKENIZER_ENTRY, Precision, text_runtime_bytes
from lorakeet.workflows.planning.rehearse_text import JUDGE, Judging, NotPlanned, Rehearsal, rehearse_judging
from lorakeet.workflows.planning.streaming import ALONE, FEWEST
from lorakeet.workflows.planning.text_run import Arrangement, require_room_to_unpack
from lorakeet.workflows.runs.open_adapter import Opened
from lorakeet.workflows.runs.output_paths import folder_above, store_folder, temporary_folder

FP32 = 4  # bytes
COPIES = 4  # of a matrix in fp32: as it is, its change, their sum, and one as it was stored or is looked at
UNCHANGED, CHANGED = 3, 6  # of a stored one, as it is read and compared or written: without a change, and with one
ROW_LOGITS = 3  # tables of logits (tokens, vocabulary) at once: live, base and the artefact's
COMPARED = 10 * 8  # bytes for each of the CELLS logits that are compared at once, in fp64 (evaluate/parity)


class BudgetTooSmall(ConfigError):
    """A budget that is smaller than the least of a check."""


@dataclass(frozen=True)
class CheckSize:
    """What is compared with base + adapter, and how much of it is held at once, beside the models."""

    what: str  # such as "the check of a merged model"
    judging: Judging  # the largest batch, and the texts that the base writes
    models: int = 2  # in torch, base + adapter among them; the other side may be llama.cpp or a server
    row: int = 0  # positions of a row whose logits are held at once
    tensors: bool = False  # whether stored tensors are compared whole, also those that the adapter does not change
    writing: int = 0  # bytes held while the artefact is written
    beside: int = 0  # bytes that another program holds in this process
    waiting: int = 0  # bytes of what the artefact says, which waits on disk where models are streamed
    artefact: int = 0  # bytes of it on disk, where it is still to be written
    more_stores: int = 0  # beside one for each model, where they are streamed


@dataclass(frozen=True)
class CheckForecast:
    """The phase that holds most, and what streaming is made of."""

    highest: Phase
    blocks: int
    block_bytes: int

    @property
    def peak(self) -> int:
        """The most bytes held."""
        return self.highest.bytes


def plan_check(opened: Opened, check: CheckSize, place: Path, console: Console) -> Opened:
    """`opened` with how its models keep its budget in `check`, which is said; as it was where it has none.

    Stores go into memory.store where the run names it, else beside `place`; `with stores(…)` makes and removes their folder.
    Raises NoRoom with the least that works, EnvironmentProblem where the disk lacks room.
    """
    budget = opened.config.memory.bytes
    if budget is None:
        return opened
    say = partial(console.print, markup=False, soft_wrap=True)
    if warning := larger_than_machine(budget):
        say(warning)
    return_freed_memory()
    spec = opened.config.model
    require_room_to_unpack(spec, budget)
    source = find_source(spec, say)
    planner = CheckPlanner.of(check, spec, source, opened.adapter)
    try:
        fewest, whole = FEWEST, planner.forecast(streamed=False)
        found = whole if whole.peak <= budget else planner.forecast(streamed=True)
        if found.peak > budget:
            fewest, found = ALONE, planner.forecast(streamed=True, slots=ALONE)
    except NotPlanned as error:
        say(str(error))
        opened.require_room(check.models, check.what, console)
        return replace(opened, kept=Arrangement(budget))
    if check.beside and min(whole.peak, found.peak) <= budget:
        say("llama.cpp maps its file: those pages are the system's to take back, and are not counted.")
    if whole.peak <= budget:
        say(f"Memory: {bytes_text(whole.peak)} planned of {bytes_text(budget)} for {check.what}; its models stay in memory.")
        return replace(opened, kept=Arrangement(budget, whole.peak))
    if found.peak > budget:
        raise BudgetTooSmall(
            f"The budget is {budget >> 20} MiB, but {check.what} takes at least {enough_for(min(found.peak, whole.peak))}, with "
            f"its models streamed from disk block by block ({enough_for(whole.peak)} with them in memory). Give that with "
            "--memory, or do it on a larger machine."
        )
    more = (budget - found.peak) // found.block_bytes if fewest != ALONE else 0  # two have no room, whatever is left
    slots = min(found.blocks, fewest + more)
    planned = found.peak + (slots - fewest) * found.block_bytes
    folder = store_folder(opened.config.memory.store, place, "check")
    needed = FP32 * planner.weights * (check.models + check.more_stores) + check.waiting + planner.spilled(found.blocks)
    _require_disk(folder, check, needed, whole.peak)
    say(
        f"Memory: {bytes_text(planned)} planned of {bytes_text(budget)} for {check.what}; weights are streamed from disk, "
        f"{slots} of {found.blocks} blocks in memory."
    )
    return replace(opened, kept=Arrangement(budget, planned, folder, slots=slots))


@contextmanager
def stores(opened: Opened, remedy: str) -> Iterator[None]:
    """A context with the folder of the stores, which is removed when it ends; a disk that gets full is told with `remedy`."""
    folder = None if opened.kept is None else opened.kept.store
    with temporary_folder(folder, f"The folder {folder} of the check", remedy):
        yield


def adapted_bytes(plan: Plan, largest: int) -> int:
    """Bytes in fp32 of the largest matrix that the adapter changes; of a stack of experts, one of them.

    What is trained whole or in rows counts as the `largest` of the model, in numbers.
    """
    sizes = [math.prod(entry.shape[1:] if entry.kind == "experts" else entry.shape) for entry in plan.entries]
    return FP32 * max([*sizes, *(largest for _ in plan.extras)], default=0)


def tensor_peak(changed: int, largest: int) -> int:
    """What is held of one stored tensor while it is made and written, or read and compared: in fp32 the largest that an adapter
    changes has `changed` bytes, and the largest of all `largest` numbers, of which a part is read at a time."""
    return max(CHANGED * changed, min(UNCHANGED * FP32 * largest, PART_BYTES))


def logits_bytes(row: int, vocabulary: int) -> int:
    """What is held of logits while those after `row` tokens are compared: a table of each side, and copies of a part of two of
    them, or while the last side computes the tiles that its table is put together from."""
    table = row * vocabulary
    return FP32 * ROW_LOGITS * table + max(COMPARED * min(CELLS, table), FP32 * table)


class CheckPlanner:
    """The forecasts of one check of a model with pairs as in `plan`; `ids` are those of trained token rows."""

    def __init__(self, check: CheckSize, spec: ModelSpec, source: Path | None, config: Any, plan: Plan) -> None:
        self.check, self.spec, self.source, self.config, self.plan = check, spec, source, config, plan
        self.ids: tuple[int, ...] = ()
        self.precision = Precision(torch.float32, torch.float32, spec.quantize)
        self.empty = empty_model(config, torch.float32)
        self.weights = sum(parameter.numel() for parameter in self.empty.parameters())
        self.runtime = text_runtime_bytes(self.precision)

    @classmethod
    def of(cls, check: CheckSize, spec: ModelSpec, source: Path, adapter: Adapter) -> CheckPlanner:
        """That of the check of a finished adapter."""
        config = read_config(source)
        planner = cls(check, spec, source, config, plan_of(empty_model(config, torch.float32), adapter))
        planner.ids = adapter.token_ids
        return planner

    @property
    def alone(self) -> int:
        """Bytes of the models' weights, of which the forecast in memory is more."""
        return int(FP32 * self.weights * self.check.models)

    def forecast(self, *, streamed: bool, slots: int = FEWEST) -> CheckForecast:
        """What is held with the models streamed, `slots` blocks in memory, or with all of their weights in memory."""
        check = self.check
        make = partial(
            partial(streamed_model_from_config, slots=slots) if streamed else model_from_config, name=self.spec.path,
            dtype=torch.float32,
            products=torch.float32, attention=self.spec.attention, quantize=self.spec.quantize, files=self.source,
        )  # fmt: skip
        found = rehearse_judging(ModelBuilder(make, self.config), self.plan, check.judging, token_ids=self.ids)
        there = slots * found.block_bytes
        own = (found.base - there) * check.models  # what models have in memory all along: all of it, where they are not streamed
        text, adapter = self.config.get_text_config(), FP32 * self.plan.parameters
        held = {
            "load": add_usage(Usage(), base=own, adapter=adapter, scratch=self._reading(found)),
            "weights": add_usage(Usage(), base=own, adapter=adapter, scratch=self._looking(found)),
            "ask": add_usage(Usage(), base=own, adapter=adapter, runtime=check.beside),
            "compare": add_usage(
                found.peaks[JUDGE], base=own + there - found.base, runtime=0 if streamed else check.beside,
                logits=logits_bytes(check.row, int(text.vocab_size)),
            ),
            "intervals": add_usage(Usage(), base=own + there, adapter=adapter, scratch=INTERVALS),
            "write": add_usage(Usage(), scratch=check.writing),
        }  # fmt: skip
        words = TOKENIZER_ENTRY * int(text.vocab_size) * check.models
        phases = phases_of(held, self.runtime + words, returning=True)
        return CheckForecast(max(phases, key=lambda phase: phase.bytes), found.blocks, found.block_bytes)

    def spilled(self, blocks: int) -> int:
        """Bytes on disk of the keys and values of a text that a streamed model writes, of which one at a time may be there."""
        judging = self.check.judging
        longest = max(judging.text_tokens + 1, judging.rows.length)
        return spilled_bytes(self.config.get_text_config(), longest, blocks) if judging.texts else 0

    def _looking(self, found: Rehearsal) -> int:
        """Beside what is in memory all along, while weights are compared: blocks have left, and llama.cpp has not begun."""
        changed = adapted_bytes(self.plan, found.largest)
        return tensor_peak(changed, found.largest) if self.check.tensors else COPIES * changed

    def _reading(self, found: Rehearsal) -> int:
        """Beside the models, while one is read: a block on its way into the store, or some tensors in a file's other dtype."""
        stored = stored_dtype(self.config)
        if found.blocks:
            family = family_of(self.config.get_text_config())
            return bytes_of_storing(self.empty, family, found.block_bytes, stored.itemsize + FP32)
        return found.being_cast(stored, torch.float32)


def _require_disk(folder: Path, check: CheckSize, needed: int, whole: int) -> None:
    """Raises EnvironmentProblem where the disk of the stores has no room for them and for what is still to be written."""
    free = shutil.disk_usage(folder_above(folder)).free
    if needed + check.artefact > free:
        raise EnvironmentProblem(
            f"To keep the budget, {check.what} writes the weights in fp32 to {folder} until it is done: {bytes_text(needed)}, "
            f"beside {bytes_text(check.artefact)} that stay; {bytes_text(free)} are free there. Free some space, name a folder "
            f"on another disk with memory.store in the run's config.yaml, or give {enough_for(whole)} with --memory."
        )
