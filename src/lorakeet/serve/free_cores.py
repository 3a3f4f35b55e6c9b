"""The number of cores for the engine while other programs of the machine compute too.

A product waits for the last of its threads. If another program uses one of two cores, both threads are as slow as the one that
shares its core, and slower: 46 tokens a second were written with two threads where one thread wrote 157 (docs/log).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lorakeet.kernels.threads import can_compute_alone, compute_alone, compute_with

INTERVAL = 0.5  # seconds between two measurements
LONGEST = 2.0  # seconds that a measurement may span: a longer one says little of the present
SHARE = 0.3  # of a core that others may use before a thread is given up: about the gain of the second of two threads
_STAT = Path("/proc/stat")
_IDLE = (3, 4)  # fields of /proc/stat's lines: idle, waiting for a disk
_GUESTS = 8  # fields from here on are in user and nice already

Measure = Callable[[], tuple[float, float]]


class FreeCores:
    """The cores that other programs leave; called before each step, it measures at most every INTERVAL seconds."""

    def __init__(
        self, most: int, *, cores: int | None = None, measure: Measure | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`most`: the first and largest number; `cores`: those that this process may use, by default all.

        `measure` returns the computed seconds of all processes and of this one (`seconds`).
        """
        self.most = self.count = most
        self.cores = max(most, available() if cores is None else cores)
        self._measure, self._clock = measure or seconds, clock
        self._when, self._seen = clock(), self._measure()

    def __call__(self) -> int:
        """At least 1."""
        now = self._clock()
        passed = now - self._when
        if passed >= INTERVAL:
            before, self._seen, self._when = self._seen, self._measure(), now
            if passed <= LONGEST:
                all_seconds, own = (after - earlier for after, earlier in zip(self._seen, before, strict=True))
                others = (all_seconds - own) / passed
                self.count = max(1, min(self.most, self.cores - math.ceil(others - SHARE)))
        return self.count


def available() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds() -> tuple[float, float]:
    """Seconds that the cores of this process have computed since the machine started, for all processes and for this one.

    Both 0 if the system is not Linux: others then count as idle.
    """
    try:
        lines = _STAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0, 0.0
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in lines:
        name, *fields = line.split()
        if name in mine:
            ticks += sum(int(field) for place, field in enumerate(fields[:_GUESTS]) if place not in _IDLE)
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system


def engine_cores() -> Callable[[], int]:
    """A function that returns the number of cores for the next step: those that are free, or OMP_NUM_THREADS.

    If thread teams cannot be separated (kernels/threads), one core is always left free: on 2 cores, teams that sleep between two
    products while the clients' traffic sometimes takes a core were half as fast as one thread.
    """
    most = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return lambda: most
    return FreeCores(most if can_compute_alone() else max(1, most - 1))


@contextmanager
def cores_for_the_engine() -> Iterator[None]:
    """A context in which this thread computes on one core, so that the engine can use all of them."""
    before = torch.get_num_threads()
    compute_alone()
    try:
        yield
    finally:
        compute_with(before)
