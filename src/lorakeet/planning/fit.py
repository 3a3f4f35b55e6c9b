"""How work fits into a memory budget: one decision for every verb.

A piece of work (a text run, an evaluation, a check, …) says in which ways it can be done, the preferred one first, and what each
takes. The first way that fits is taken, and what is left of the budget goes to further blocks in memory. Where none fits, or the
model cannot be planned, the work is refused before anything is loaded: a plan is a bound that is kept, not an estimate.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic

import torch

from lorakeet.errors import ConfigError, EnvironmentProblem, Remedy
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.budget import Budget, available_memory, enough_for, larger_than_machine, machine_bytes
from lorakeet.memory.cuda import gpu_warning, limit_gpu_memory
from lorakeet.memory.measure import resident_bytes
from lorakeet.memory.spill import OF_A_RUN
from lorakeet.memory.store import CPU
from lorakeet.memory.transfer import STAGINGS
from lorakeet.models.files.source import bytes_to_unpack
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.model import NotStreamed
from lorakeet.planning.rehearse_text import NotPlanned
from lorakeet.runs.output_paths import folder_above, store_folder
from lorakeet.runs.residency import RESIDENT, P, Residency, Way, with_more

Say = Callable[[str], None]
FREE_SHARE = 0.75  # of the host's free memory: what is pinned at most where memory.keep is auto


class BudgetedWork(Generic[P]):
    """Work that is to fit into a memory budget.

    Plans count what the process holds when they are made, so nothing is computed before `ways` or `plan` is called.
    """

    what: str  # in messages, such as "this run"
    spec: ModelSpec  # whose .gguf file may still have to be unpacked
    option: str = "--memory"  # by which the budget is given
    device: torch.device = CPU
    keep: str = "auto"  # memory.keep: from where blocks come to a GPU
    named_store: str = ""  # memory.store
    out: Path | None = None  # what is written; its store is removed afterwards. None: the store is kept for later runs
    remedy: str = OF_A_RUN  # for a full disk

    @property
    def folder(self) -> Path:
        """Where stores and scratch files are."""
        return store_folder(self.named_store, self.out)

    def ways(self, budget: int) -> Iterator[Way]:
        """The ways to do it, the preferred one first. Raises NotStreamed if no further one is possible."""
        raise NotImplementedError

    def plan(self, way: Way) -> P:
        """What `way` takes. Raises NotPlanned or NotStreamed if that cannot be known or done."""
        raise NotImplementedError

    def words(self, way: Way, plan: P) -> str:
        """The way as a person reads it."""
        return way_text(way, plan.blocks, self.device, host=keeps_in_host(self, way, plan))

    def size_words(self) -> str:
        """What decides the size, for a too_small_text; begins with a comma."""
        return ""

    def advice(self) -> str:
        """What to do about a budget that is too small."""
        return f"Give that with {self.option}, or use a larger machine."

    @property
    def state_bytes(self) -> int:
        """Bytes of the hidden states of a micro-batch between two blocks, which wait in pinned host memory for a GPU."""
        return 0

    def head_tiles(self, way: Way) -> tuple[int, int]:
        """Tiles of a head that comes to a GPU from the store, and the bytes of one; (0, 0) where it does not."""
        return 0, 0

    def disk(self, way: Way, plan: P) -> Mapping[Path, int]:
        """Bytes that are written while the work lasts, by path."""
        return {}


@dataclass(frozen=True)
class WayChoice(Generic[P]):
    """The way that was chosen, with further blocks in memory; if none fits, the one that takes least."""

    way: Way
    plan: P
    fits: bool
    tried: tuple[tuple[Way, P], ...] = field(repr=False)
    why_no_more: str = ""  # why no further way is possible

    @property
    def least(self) -> P:
        """The plan of that way without further blocks."""
        return min((plan for _, plan in self.tried), key=lambda plan: plan.peak)


def choose(work: BudgetedWork[P], budget: Budget) -> WayChoice[P]:
    """The first way that fits into `budget`, or the least. Raises ConfigError for a model that cannot be planned."""
    tried: list[tuple[Way, P]] = []
    why = ""
    try:
        for way in work.ways(budget.bytes):
            tried.append((way, work.plan(way)))
            if tried[-1][1].peak <= budget.bytes:
                break
    except NotStreamed as error:
        why = error.reason
    except NotPlanned as error:
        if not tried:
            raise
        why = str(error)  # of a later way: what the earlier ones take is known
    way, plan = min(tried, key=lambda one: one[1].peak)
    if not plan.blocks:
        return WayChoice(way, plan, plan.peak <= budget.bytes, tuple(tried), why)
    slots = min(way.slots, plan.blocks)
    more = min(plan.blocks - slots, plan.more_blocks(budget.bytes))
    filled = with_more(plan, more * plan.block_bytes, plan.slot_kind, plan.growing)
    return WayChoice(replace(way, slots=slots + more), filled, plan.peak <= budget.bytes, tuple(tried), why)


def fit_budget(work: BudgetedWork[P], budget: Budget, say: Say) -> Residency[P]:
    """How `work` keeps the budget, which is printed. From now on freed memory goes back to the system, and on a CUDA device
    torch is limited to the budget.

    Raises ConfigError with the least that works, or for a model that cannot be planned; EnvironmentProblem for a device on
    which no budget is kept and for a disk that is too small.
    """
    if not budget:
        return Residency()
    device, gpu = work.device, None if work.device.type == "cpu" else work.device
    if device.type not in ("cpu", "cuda"):
        raise EnvironmentProblem(
            f"A memory budget is kept on the CPU and on CUDA devices, but the model would be on {device}. Set model.device to "
            f"cpu, or leave {work.option} out."
        )
    if gpu is None:
        return_freed_memory()
        require_space_to_unpack(work.spec, budget, work.option)
    if warning := larger_than_machine(budget) if gpu is None else gpu_warning(gpu, budget):
        say(warning)
    if gpu is None and work.keep == "host":
        say("memory.keep host is for CUDA devices. On the CPU, whose memory the budget bounds, blocks come from disk.")
    try:
        choice = choose(work, budget)
    except NotPlanned as error:
        option = work.option
        raise ConfigError(f"{option} cannot be kept without a plan of the memory: {error} Leave {option} out.") from error
    found = _chosen(work, choice, budget, say)
    if gpu is not None:
        limit_gpu_memory(gpu, budget.bytes)
    return found


def fit_free(work: BudgetedWork[P], free: Budget, say: Say) -> Residency[P]:
    """How `work` fits into what is free on its device, where no budget was given; printed, unless all fits on a CPU.

    Raises ConfigError and EnvironmentProblem as `fit_budget`, but for a model that cannot be planned: that goes as it is.
    """
    try:
        choice = choose(work, free)
    except NotPlanned as error:
        say(f"{error} How much memory the run takes is not known before it has run.")
        return Residency()
    if work.device.type == "cpu":
        if choice.fits and choice.way == RESIDENT:
            return Residency(plan=choice.plan)
        return_freed_memory()
    return _chosen(work, choice, free, say)


def _chosen(work: BudgetedWork[P], choice: WayChoice[P], budget: Budget, say: Say) -> Residency[P]:
    """The chosen way, which is printed. Raises ConfigError where none fits, and for too little host memory or disk."""
    if not choice.fits:
        needed = choice.plan.peak
        remedies = [Remedy("memory.budget", enough_for(needed), f"Allow {enough_for(needed)}")] * (not budget.free)
        values = {"needed": needed, "budget": budget.bytes}
        raise ConfigError(too_small_text(work, choice, budget), code="does-not-fit", values=values, remedies=remedies)
    gpu = None if work.device.type == "cpu" else work.device
    way, plan = choice.way, choice.plan
    pinned = keeps_in_host(work, way, plan)
    if way.streamed:
        _require_disk(work, way, plan)
    of = f"{budget} free on {budget.free}" if budget.free else str(budget)
    say(f"Memory: {bytes_text(plan.peak)} planned of {of} for {work.what}: {work.words(way, plan)}.{_why(choice, budget)}")
    if way.streamed and gpu is not None:
        size, line = host_memory(work, way, plan)
        if size > machine_bytes():
            raise ConfigError(
                f"{line} This machine has {bytes_text(machine_bytes())}. Set memory.keep to disk, from where they come then, or "
                "lower train.batch_size.",
                code="does-not-fit",
                values={"needed": size, "budget": machine_bytes()},
            )
        say(line)
    return Residency(budget, way, plan, work.folder if way.streamed else None, gpu, pinned, work.remedy)


def _why(choice: WayChoice[P], budget: Budget) -> str:
    """Why the preferred way was not taken, where no budget was given; empty where it was."""
    preferred, plan = choice.tried[0] if choice.tried else (choice.way, choice.plan)
    if not budget.free or choice.way == preferred:
        return ""
    return f" With nothing saved it would be {bytes_text(plan.peak)}, in phase '{plan.highest.name}'."


def require_space_to_unpack(spec: ModelSpec, budget: Budget, option: str) -> None:
    """Raises ConfigError if a .gguf file that is still to be unpacked takes more than the budget."""
    held = bytes_to_unpack(spec)
    needed = resident_bytes() + held
    if held and needed > budget.bytes:
        raise ConfigError(
            f"The memory budget is {budget}, but unpacking {spec.path}, which is done once, takes about {enough_for(needed)}. "
            f"Raise {option}, or run once without it: later runs read the copy that stays.",
            code="does-not-fit",
            values={"needed": needed, "budget": budget.bytes},
        )


def way_text(way: Way, blocks: int, device: torch.device, *, host: bool = False) -> str:
    """The way as a person reads it: where the weights are, and whether those that come to a GPU are kept by its `host`."""
    where = "in memory" if device.type == "cpu" else f"on {device}"
    if not way.streamed:
        text = f"all weights stay {where}"
    else:
        source = "pinned host memory" if host else "disk"
        text = f"blocks are streamed from {source}, {way.slots} of {blocks} {where}"
    return f"{text}; of each row the first {way.longest} tokens are compared" if way.longest else text


def too_small_text(work: BudgetedWork[P], choice: WayChoice[P], budget: Budget) -> str:
    """The budget, the least that works and what would help."""
    least, how = choice.plan, "with all weights in memory"
    if choice.way.streamed:
        whole = [plan.peak for way, plan in choice.tried if not way.streamed and way.longest == choice.way.longest][:1]
        how = "with blocks streamed from disk" + "".join(f" ({enough_for(peak)} with all weights in memory)" for peak in whole)
    why = f" {choice.why_no_more}" if choice.why_no_more else ""
    return (
        f"{budget.sentence}, but {work.what} takes at least {enough_for(least.peak)} in phase "
        f"'{least.highest.name}', {how}{work.size_words()}.{why}{' Close other programs that use it.' * bool(budget.free)} "
        f"{work.advice()}"
    )


def _require_disk(work: BudgetedWork[P], way: Way, plan: P) -> None:
    """Raises EnvironmentProblem if a disk is too small for what is written while the work lasts."""
    disks: dict[int, dict[Path, int]] = {}
    for path, size in work.disk(way, plan).items():
        disks.setdefault(disk_of(path), {})[path] = size
    for parts in disks.values():
        needed, free = sum(parts.values()), shutil.disk_usage(folder_above(next(iter(parts)))).free
        if needed > free:
            sizes = " and ".join(f"{bytes_text(size)} in {path}" for path, size in parts.items() if size)
            raise EnvironmentProblem(
                f"To keep the memory budget, {work.what} needs {sizes} on disk, where {bytes_text(free)} are free. "
                f"{work.remedy}",
                code="disk-full",
            )


def disk_of(path: Path) -> int:
    """The number of the disk that `path` will be on."""
    return folder_above(path).stat().st_dev


def keeps_in_host(work: BudgetedWork[P], way: Way, plan: P) -> bool:
    """Whether what comes to a GPU is kept in pinned memory once it was read: as memory.keep says, or, where it says auto, if that
    takes at most FREE_SHARE of the host's free memory.
    """
    comes = way.slots < plan.blocks or work.head_tiles(way)[0] > 0
    if not way.streamed or work.device.type == "cpu" or not comes or work.keep == "disk":
        return False
    return work.keep == "host" or _pinned_bytes(work, way, plan, kept=True) <= FREE_SHARE * available_memory()[0]


def host_memory(work: BudgetedWork[P], way: Way, plan: P) -> tuple[int, str]:
    """What streaming to a CUDA device pins of the host's memory, in bytes and in words: torch takes powers of two for it."""
    kept = keeps_in_host(work, way, plan)
    size = _pinned_bytes(work, way, plan, kept=kept)
    head = bool(work.head_tiles(way)[0])
    leave, buffers = way.slots < plan.blocks, f"{STAGINGS} buffers of a block"
    every = f"the {plan.blocks} frozen blocks{' and the head' * head}" if leave else f"{buffers}{' and the head' * head}"
    what = every if kept else f"{buffers}{' and of the head' * head}"
    more = " and the inputs of blocks" * bool(work.state_bytes and way.spilled)
    why = ""
    if not kept and work.keep == "auto" and (leave or head):
        whole, free = _pinned_bytes(work, way, plan, kept=True), available_memory()[0]
        why = f" To keep {every} there would take {bytes_text(whole)}, and {bytes_text(free)} are free."
    return size, f"Pinned host memory: about {bytes_text(size)}, {what}{more}, beside what Python and its libraries use.{why}"


def _pinned_bytes(work: BudgetedWork[P], way: Way, plan: P, *, kept: bool) -> int:
    """Bytes that are pinned with all blocks and tiles of the head `kept`, or with the buffers through which they come."""
    states = work.state_bytes if way.spilled else 0
    tiles, tile = work.head_tiles(way)
    parts = (plan.blocks if kept and way.slots < plan.blocks else STAGINGS), (tiles if kept else min(tiles, STAGINGS))
    size = sum(count * _power(each) for count, each in zip(parts, (plan.block_bytes, tile), strict=True))
    return size + (way.together * plan.blocks * _power(states) if states else 0)


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length() if size else 0
