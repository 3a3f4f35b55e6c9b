"""True if code made for a CPU computes with a tensor; in a rehearsal, CPU tensors may stand for those of another device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

REHEARSED = ContextVar("lorakeet_rehearsed", default=False)  # whether tensors on the CPU stand for those of another device


def is_cpu(device: torch.device) -> bool:
    """True if `device` is the CPU and does not stand for another device."""
    return device.type == "cpu" and not REHEARSED.get()


@contextmanager
def standing_for(device: torch.device) -> Iterator[None]:
    """A context in which tensors on the CPU are treated as if they were on `device`. torch has no fake tensors of a GPU with a
    backward pass where there is no GPU."""
    before = REHEARSED.set(device.type != "cpu")
    try:
        yield
    finally:
        REHEARSED.reset(before)
