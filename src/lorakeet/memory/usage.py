"""Memory use at one moment, by kind, and the moments of a segment of a run: what a ledger records (memory/ledger)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

PERSISTENT = ("base", "adapter", "moments", "gradients")  # kinds that stay in memory through a step
NO_BLOCK = -1  # the block of a segment outside of all blocks


@dataclass(frozen=True)
class Usage:
    """Bytes in use at one moment, such as the peak of a phase, and their kinds."""

    bytes: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    heap: int = 0  # of these, temporary tensors small enough for the C library's heap (memory/allocator)


@dataclass
class UsageSegment:
    """Memory use from one mark to the next: at its start, after each operator that allocated, at its end."""

    phase: str
    event: str  # its start: a "phase", or a block's "forward", "after" (its forward pass) or "backward"
    block: int = NO_BLOCK
    moments: list[Usage] = field(default_factory=list)


def add_usage(peak: Usage, **kinds: int) -> Usage:
    """Returns the same moment with more bytes of some kinds."""
    together = Counter(peak.kinds) + Counter(kinds)
    return Usage(peak.bytes + sum(kinds.values()), dict(together), peak.heap)


def larger_usage(one: Usage, other: Usage) -> Usage:
    """Returns the moment with more bytes."""
    return one if one.bytes >= other.bytes else other
