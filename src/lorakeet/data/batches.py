"""The rows of each step: a seeded shuffle per epoch. A step depends on its number alone, so resuming stores nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Order = NDArray[np.int64]
_POOL = 16  # steps whose rows are sorted by length together: wide enough to even lengths out, narrow enough to stay random


@dataclass(frozen=True)
class StepOrder:
    """The order of `rows` rows in steps of `batch_size`; each epoch has every row once, its last step may be shorter.

    With `lengths` (tokens per row), a step has rows of similar length, and the steps come in random order.
    """

    rows: int
    batch_size: int
    seed: int
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.rows < 1 or self.batch_size < 1:
            raise ValueError(f"rows ({self.rows}) and batch_size ({self.batch_size}) must be at least 1")
        if self.lengths is not None and len(self.lengths) != self.rows:
            raise ValueError(f"{len(self.lengths)} lengths were given for {self.rows} rows")

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch."""
        return math.ceil(self.rows / self.batch_size)

    def indices(self, step: int) -> list[int]:
        """The rows of step `step`, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.lengths is None:
            order = _shuffled(self.rows, self.seed, epoch)
        else:
            order = _grouped(self.lengths, self.batch_size, self.seed, epoch)
        return [int(row) for row in order[position * self.batch_size : (position + 1) * self.batch_size]]


def distribute_rows(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Distributes rows of these `lengths` over `parts` of about equal length; returns each part's row numbers, ascending.

    Longest row first, ties in order, each to the shortest part so far. Deterministic in the lengths.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        least = totals.index(min(totals))
        found[least].append(number)
        totals[least] += lengths[number]
    return [sorted(part) for part in found]


@lru_cache(maxsize=8)
def _shuffled(count: int, seed: int, epoch: int, purpose: str = "rows") -> Order:
    # NumPy keeps the raw output of bit generators stable over versions; it does not promise that of shuffle().
    key = int.from_bytes(hashlib.sha256(f"{purpose} {seed} {epoch}".encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


@lru_cache(maxsize=2)
def _grouped(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> Order:
    """Shuffled rows, sorted by length within pools; whole steps are then shuffled, an incomplete one stays last."""
    order = _shuffled(len(lengths), seed, epoch)
    tokens = np.array(lengths, np.int64)
    whole = len(order) - len(order) % batch_size
    pool = _POOL * batch_size
    pools = [order[start : min(start + pool, whole)] for start in range(0, whole, pool)]
    steps = [rows[np.argsort(tokens[rows], kind="stable")].reshape(-1, batch_size) for rows in pools]
    if not steps:
        return order
    together = np.concatenate(steps)
    shuffled = together[_shuffled(len(together), seed, epoch, "steps")].reshape(-1)
    return np.concatenate([shuffled, order[whole:]])
