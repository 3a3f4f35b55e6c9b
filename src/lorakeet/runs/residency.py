"""Where the weights and states of a model are while it is used, so that a memory budget is kept."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from rich.console import Console

from lorakeet.errors import ConfigError
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.memory.measure import PeakMemory
from lorakeet.memory.spill import OF_A_RUN, HostSpill, Spill
from lorakeet.memory.transfer import CudaTransfer
from lorakeet.models.streaming.load import Residence
from lorakeet.models.streaming.model import StreamedBlocks
from lorakeet.models.text.model import TextModel
from lorakeet.runs.output_paths import temporary_folder

ALONE = 1  # block in memory: the next one is read only after it has left
PLANNED_ATTENTION = "varlen"  # of a model on shapes
FEWEST = 2  # blocks in memory where one computes while the next one is read


@dataclass(frozen=True)
class Way:
    """One way to use a model: with all of its weights in memory, or with its blocks streamed from a store."""

    streamed: bool = False
    slots: int = FEWEST  # blocks in memory, if streamed; if blocks are computed again, those that are not
    recomputed: bool = False  # whether blocks keep their input alone and are computed again in the backward pass
    micro_tokens: int | None = None  # in place of train.micro_tokens
    one_base: bool = False  # whether the certificate makes do with the base that was trained on
    together: int = 0  # micro-batches of a training step that pass through a block while it is in memory; 0 for all
    spilled: bool = False  # whether hidden states between blocks are on disk, or, of a model on a GPU, in host memory
    ends: bool = False  # whether embedding and head stay in memory where blocks are streamed, in place of reads row by row
    longest: int | None = None  # tokens of a row that a check compares, if longer rows do not fit
    change: str = ""  # of the settings, as a person reads it

    @property
    def residence(self) -> Residence:
        """Where the parts of a streamed model on shapes are."""
        return Residence(self.slots, ends=self.ends)


RESIDENT = Way()
STREAMED_WAYS = Way(streamed=True, slots=FEWEST), Way(streamed=True, slots=ALONE)  # the first one that fits


@dataclass(frozen=True)
class MemoryPlan:
    """What one way takes, phase by phase, and what each further block in memory adds to it."""

    forecast: Forecast
    blocks: int = field(default=0, kw_only=True)  # that are streamed
    block_bytes: int = field(default=0, kw_only=True)  # of one slot
    growing: Collection[str] | None = field(default=None, kw_only=True)  # phases that use further slots; None for all
    slot_kind: str = field(default="base", kw_only=True)  # of the bytes of a slot

    @property
    def highest(self) -> Phase:
        """The phase with the most bytes."""
        return self.forecast.peak

    @property
    def peak(self) -> int:
        """The most bytes in use."""
        return self.highest.bytes

    def more_blocks(self, budget: int) -> int:
        """How many further blocks fit into `budget` bytes."""
        peaks = [phase.bytes for phase in self.forecast.phases if self.growing is None or phase.name in self.growing]
        return max(0, (budget - max(peaks)) // self.block_bytes) if peaks and self.blocks else 0


P = TypeVar("P", bound=MemoryPlan)


def with_more(plan: P, size: int, kind: str, phases: Collection[str] | None) -> P:
    """The same plan with `size` more bytes of one kind in some of its phases; None for all."""

    def grown(phase: Phase) -> Phase:
        if phases is not None and phase.name not in phases:
            return phase
        return Phase(phase.name, {**phase.kinds, kind: phase.kinds.get(kind, 0) + size})

    return replace(plan, forecast=Forecast(tuple(map(grown, plan.forecast.phases)))) if size else plan


@dataclass(frozen=True)
class Residency(Generic[P]):
    """How a memory budget is kept. Without a budget, or less free memory than everything takes, all stays in memory."""

    budget: Budget = field(default_factory=Budget)  # given, or what was free
    way: Way = RESIDENT
    plan: P | None = None  # None if nothing was planned
    folder: Path | None = None  # of stores and scratch files
    gpu: torch.device | None = None  # the CUDA device whose memory the budget bounds; None for that of the process
    pinned: bool = False  # whether blocks stay in pinned host memory once they were read
    remedy: str = OF_A_RUN  # for a full disk

    @property
    def given(self) -> bool:
        """Whether the user gave a budget."""
        return bool(self.budget) and not self.budget.free

    @property
    def one_base(self) -> bool:
        """Whether one base alone fits, also in the certificate."""
        return self.given or self.way.one_base

    @property
    def unrestricted(self) -> bool:
        """Whether the run goes as it would with any amount of memory."""
        return not self.given and self.way == RESIDENT

    @property
    def planned(self) -> int | None:
        """The peak of the plan in bytes; None if nothing was planned."""
        return None if self.plan is None else self.plan.peak

    @property
    def store(self) -> Path | None:
        """The folder of the stores; None where all weights are in memory."""
        return self.folder if self.way.streamed else None

    def spilled_states(self, text: TextModel) -> Spill:
        """New storage for hidden states between blocks of `text`: in memory, on disk, or, if it is on a GPU, in host memory."""
        if self.gpu is not None and self.way.spilled:
            return HostSpill(cast(CudaTransfer, cast(StreamedBlocks, text.streamed).stream.transfer))
        return Spill(self.folder if self.way.spilled else None, self.remedy)

    def waiting(self) -> Spill:
        """New storage for tensors that wait to be written: on disk if blocks are streamed."""
        return Spill(self.store, self.remedy)


@contextmanager
def stream_closed(text: TextModel) -> Iterator[Any]:
    """A context at whose end the store of a streamed model is closed: before its folder is removed."""
    try:
        yield text
    finally:
        if text.streamed is not None:
            text.streamed.stream.close()


@contextmanager
def temporary_stores(residency: Residency[Any], remedy: str | None = None) -> Iterator[None]:
    """A context with the folder of the stores, which is removed when it ends; a full disk is reported with `remedy`."""
    folder = residency.store
    with temporary_folder(folder, f"The folder {folder} of streamed weights", remedy or residency.remedy):
        yield


def require_planned_attention(residency: Residency[Any], text: TextModel, requested: str = "auto") -> None:
    """Raises ConfigError if the model cannot attend as it was planned under a budget, which shows when it is loaded."""
    planned = PLANNED_ATTENTION if requested == "auto" else requested
    if residency.budget and text.attention != planned:
        raise ConfigError(
            f"{text.name} attends with {text.attention}, row by row, but --memory is planned for attention {planned}, over "
            "packed rows. Leave --memory out."
        )


def say_peak(memory: PeakMemory, residency: Residency[Any], console: Console, *, mapped: bool = False) -> None:
    """Prints the peak of the process, its budget and its plan; with a warning if the budget was exceeded.

    With `mapped`, pages of a file that llama.cpp has mapped are in the peak, which the budget leaves out: no warning then.
    """
    found = f"{bytes_text(memory.bytes)} in use at most{', sampled 20 times a second' if memory.sampled else ''}"
    found += ", pages of llama.cpp's file among it" * mapped
    plan = "" if residency.planned is None else f" and {bytes_text(residency.planned)} planned"
    text = f"Memory: {found}, of {residency.budget} allowed{plan}."
    if memory.bytes > residency.budget.bytes and not mapped:
        text = (
            f"WARNING: the budget was not kept. {text} The results are sound; give more next time, and please report the model "
            "and this line."
        )
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def peak_said(residency: Residency[Any], console: Console, *, mapped: bool = False) -> Iterator[None]:
    """A context at whose end `say_peak` prints its peak, if there is a budget for the memory of the process."""
    if not residency.budget or residency.gpu is not None:
        yield
        return
    with PeakMemory() as memory:
        yield
    say_peak(memory, residency, console, mapped=mapped)
