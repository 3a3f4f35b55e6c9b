"""What is held at one moment, by kind, and the moments of a stretch of a run: the entries of a ledger (memory/ledger)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

PERSISTENT = ("base", "adapter", "moments", "gradients")  # kinds that stay, while others come and go
NO_BLOCK = -1  # the block of a stretch that begins outside of all blocks


@dataclass(frozen=True)
class Usage:
    """The most bytes held at once in one phase, and what they were at that moment."""

    bytes: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    heap: int = 0  # of these, what comes and goes in pieces that the C library keeps on its heap (memory/allocator)


@dataclass
class UsageSegment:
    """What was held from one mark to the next: at its beginning, after each operator that made something, at its end."""

    phase: str
    event: str  # where it begins: a phase, or a block's "forward", "after" (its forward pass) or "backward"
    block: int = NO_BLOCK
    moments: list[Usage] = field(default_factory=list)


def add_usage(peak: Usage, **kinds: int) -> Usage:
    """The same moment with so many more bytes of some kinds."""
    together = Counter(peak.kinds) + Counter(kinds)
    return Usage(peak.bytes + sum(kinds.values()), dict(together), peak.heap)


def larger_usage(one: Usage, other: Usage) -> Usage:
    """Whichever of two moments holds more."""
    return one if one.bytes >= other.bytes else other
