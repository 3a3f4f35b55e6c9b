"""How a run streams its frozen blocks within a budget: rehearsed, and of the ways that fit the one that moves the fewest bytes.

A pass of `together` micro-batches goes forth and back through n blocks, of which s are in memory; the record used longest ago
makes room (memory/stream). So a step of b micro-batches moves

    blocks     ⌈b / together⌉ · 2·(n − s) · bytes of a block       nothing where every block has a place
    inputs     b · 2·n · bytes of a state                          where the inputs of blocks are kept on disk

or less, where the lowest blocks train nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.workflows.planning.forecast_text_run import Planned
from lorakeet.workflows.planning.rehearse_text import STEP, Streaming

FEWEST = 2  # blocks in memory: one is computed with, one is read
ALONE = 1  # block in memory, where there is no room for another to be read meanwhile
HELD_STATES = 3  # of a micro-batch on its way, about: what a block gets, what it gives, and what else its decoder hands to it
MOST_TOGETHER = 4  # micro-batches: each adds some 5 s to the rehearsal of 32 blocks


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a step: how many, and the bytes of one's hidden states."""

    count: int
    state_bytes: int


@dataclass(frozen=True)
class StreamingChoice:
    """A way to stream, with what the run then holds."""

    planned: Planned
    slots: int  # blocks in memory
    together: int  # micro-batches that pass through a block while it is in
    spill: bool  # whether the inputs of blocks are kept on disk
    moved: int  # bytes from and to the disk in a step

    @property
    def all_stay(self) -> bool:
        """Whether every block has a place: each is read once, and computed a second time in the backward pass."""
        return self.slots >= self.planned.blocks


def choose_streaming(plan: Callable[[Streaming], Planned], batches: Batches, budget: int) -> StreamingChoice | None:
    """The way that moves the fewest bytes within `budget`; None where there is none. `plan` rehearses a way (memory/ledger).

    Ways are ordered by an estimate from the rehearsals of one micro-batch at a time; the one that is taken has been rehearsed.
    """
    for way in sorted(_estimated(plan, batches, budget), key=lambda way: (way.moved, way.planned.peak)):
        exact = _filled(plan(Streaming(way.together, way.spill)), way.together, way.spill, batches, budget)
        if exact.planned.peak <= budget:
            return exact
    return None


def least_streamed(plan: Callable[[Streaming], Planned]) -> int:
    """The smallest budget that streaming keeps."""
    return plan(Streaming(together=1, spill=True)).peak


def _estimated(plan: Callable[[Streaming], Planned], batches: Batches, budget: int) -> Iterator[StreamingChoice]:
    """The ways that seem to fit; inputs go to disk only where something moves with all of them in memory."""
    for spill in (False, True):
        one = plan(Streaming(1, spill))
        held = HELD_STATES + (0 if spill else one.blocks)
        for together in range(1, min(batches.count, MOST_TOGETHER) + 1):
            way = _filled(_with(one, 0, (together - 1) * batches.state_bytes * held), together, spill, batches, budget)
            if way.planned.peak <= budget:
                yield way
            if way.planned.peak <= budget and not way.moved:
                return


def _filled(planned: Planned, together: int, spill: bool, batches: Batches, budget: int) -> StreamingChoice:
    """`planned`, which holds as few blocks as can be, with as many as fit into `budget`."""
    fewest = min(FEWEST, planned.blocks)
    room = max(0, budget - planned.peak) // planned.block_bytes
    slots = min(planned.blocks, fewest + room)
    moved = math.ceil(batches.count / together) * 2 * (planned.blocks - slots) * planned.block_bytes
    moved += batches.count * 2 * planned.blocks * batches.state_bytes if spill else 0
    return StreamingChoice(_with(planned, (slots - fewest) * planned.block_bytes, 0), slots, together, spill, moved)


def _with(planned: Planned, blocks: int, states: int) -> Planned:
    """The same run with so many more bytes of blocks, all along, and of hidden states, in its steps."""

    def more(phase: Phase) -> Phase:
        added = {"base": blocks, "saved activations": states if phase.name == STEP else 0}
        kinds = {kind: phase.kinds.get(kind, 0) + size for kind, size in added.items() if size}
        return Phase(phase.name, {**phase.kinds, **kinds})

    return replace(planned, forecast=Forecast(tuple(map(more, planned.forecast.phases))))
