"""How a run streams its frozen blocks within a budget: rehearsed, and of the ways that fit the one that moves the fewest bytes.

A pass of `together` micro-batches goes forth and back through n blocks, of which s are in memory; the record used longest ago
makes room (memory/stream). So a step of b micro-batches moves

    blocks     ⌈b / together⌉ · 2·(n − s) · bytes of a block       nothing where every block has a place
    inputs     b · 2·n · bytes of a state                          where the inputs of blocks are kept on disk
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.train.rehearsal import STEP, Streaming
from lorakeet.workflows.forecast_run import Planned

FEWEST = 2  # blocks in memory: one is computed with, one is read
HELD_STATES = 2  # of a micro-batch on its way: what a block gets and what it gives


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a step: how many, and the bytes of one's hidden states."""

    count: int
    state_bytes: int


@dataclass(frozen=True)
class Choice:
    """A way to stream, with what the run then holds."""

    planned: Planned
    slots: int  # blocks in memory
    together: int  # micro-batches that pass through a block while it is in
    aside: bool  # whether the inputs of blocks are kept on disk
    moved: int  # bytes from and to the disk in a step

    @property
    def all_stay(self) -> bool:
        """Whether every block has a place: each is read once, and computed a second time in the backward pass."""
        return self.slots >= self.planned.blocks


def choose_streaming(plan: Callable[[Streaming], Planned], batches: Batches, budget: int) -> Choice | None:
    """The way that moves the fewest bytes within `budget`; None where there is none. `plan` rehearses a way (memory/ledger)."""
    found: list[Choice] = []
    for aside in (False, True):
        found += [choice for choice in _ways(plan, batches, budget, aside) if choice.planned.peak <= budget]
        if any(choice.moved == 0 for choice in found):
            break
    return min(found, key=lambda choice: (choice.moved, choice.planned.peak), default=None)


def least_streamed(plan: Callable[[Streaming], Planned]) -> int:
    """The smallest budget that streaming keeps."""
    return plan(Streaming(together=1, aside=True)).peak


def _ways(plan: Callable[[Streaming], Planned], batches: Batches, budget: int, aside: bool) -> Iterator[Choice]:
    """Every number of micro-batches together, each with as many blocks as fit; at least two, or all where there is but one."""
    one = plan(Streaming(together=1, aside=aside))
    fewest, held = min(FEWEST, one.blocks), HELD_STATES + (0 if aside else one.blocks)
    for together in range(1, batches.count + 1):
        several = _with(one, 0, (together - 1) * batches.state_bytes * held)
        room = max(0, budget - several.peak) // one.block_bytes
        slots = min(one.blocks, fewest + room)
        moved = math.ceil(batches.count / together) * 2 * (one.blocks - slots) * one.block_bytes
        moved += batches.count * 2 * one.blocks * batches.state_bytes if aside else 0
        yield Choice(_with(several, (slots - fewest) * one.block_bytes, 0), slots, together, aside, moved)


def _with(planned: Planned, blocks: int, states: int) -> Planned:
    """The same run with so many more bytes of blocks, all along, and of hidden states, in its steps."""

    def more(phase: Phase) -> Phase:
        added = {"base": blocks, "saved activations": states if phase.name == STEP else 0}
        kinds = {kind: phase.kinds.get(kind, 0) + size for kind, size in added.items() if size}
        return Phase(phase.name, {**phase.kinds, **kinds})

    return replace(planned, forecast=Forecast(tuple(map(more, planned.forecast.phases))))
