"""The ways to stream a text run's frozen blocks, the one that moves the fewest bytes first.

A pass of `together` micro-batches goes forth and back through n blocks, of which s are in memory; the record used longest ago
is replaced (memory/stream). So a step of b micro-batches moves

    blocks     ⌈b / together⌉ · 2·(n − s) · bytes of a block       nothing if all blocks are in memory
    inputs     b · 2·n · bytes of a state                          if the inputs of blocks are on disk

or less, if the lowest blocks train nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.workflows.planning.rehearse_text import STEP
from lorakeet.workflows.runs.residency import FEWEST, MemoryPlan, Way

STATES_ON_THE_WAY = 3  # of a micro-batch, about: a block's input, its output, and what else the decoder hands to it
MOST_TOGETHER = 4  # micro-batches: each adds some 5 s to the rehearsal of 32 blocks
LEAST = Way(streamed=True, together=1, spilled=True)


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a step: how many, and the bytes of one's hidden states."""

    count: int
    state_bytes: int


def streaming_ways(plan: Callable[[Way], MemoryPlan], batches: Batches, budget: int) -> Iterator[Way]:
    """Ways that seem to fit into `budget`, the one that moves the fewest bytes first; at the end the way that takes least.

    They are ordered by an estimate from two rehearsals (`plan`) of one micro-batch at a time.
    """
    found = sorted(_estimated(plan, batches, budget), key=lambda one: one[:2])
    yield from (way for _, _, way in found)
    yield LEAST


def bytes_moved(way: Way, plan: MemoryPlan, batches: Batches) -> int:
    """Bytes read from and written to the disk in a step."""
    moved = math.ceil(batches.count / way.together) * 2 * (plan.blocks - way.slots) * plan.block_bytes
    return moved + (batches.count * 2 * plan.blocks * batches.state_bytes if way.spilled else 0)


def _estimated(plan: Callable[[Way], MemoryPlan], batches: Batches, budget: int) -> Iterator[tuple[int, int, Way]]:
    """Bytes moved, peak and way, of those that seem to fit; inputs are spilled only if something moves with all in memory."""
    for spilled in (False, True):
        one = plan(Way(True, together=1, spilled=spilled))
        states = STATES_ON_THE_WAY + (0 if spilled else one.blocks)
        for together in range(1, min(batches.count, MOST_TOGETHER) + 1):
            way = Way(True, together=together, spilled=spilled)
            estimate = _with_states(one, (together - 1) * batches.state_bytes * states)
            if estimate.peak > budget:
                continue
            slots = min(one.blocks, FEWEST + estimate.more_blocks(budget))
            moved = bytes_moved(replace(way, slots=slots), one, batches)
            yield moved, estimate.peak + (slots - min(FEWEST, one.blocks)) * one.block_bytes, way
            if not moved:
                return


def _with_states(plan: MemoryPlan, size: int) -> MemoryPlan:
    """The same plan with `size` more bytes of hidden states in its steps."""

    def more(phase: Phase) -> Phase:
        if phase.name != STEP or not size:
            return phase
        return Phase(phase.name, {**phase.kinds, "saved activations": phase.kinds.get("saved activations", 0) + size})

    return replace(plan, forecast=Forecast(tuple(map(more, plan.forecast.phases))))
