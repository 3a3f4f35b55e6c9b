"""True if code made for a CPU computes with a tensor; in a rehearsal, CPU tensors may stand for those of another device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ELSEWHERE = ContextVar("lorakeet_elsewhere", default=False)


def is_cpu(device: torch.device) -> bool:
    """True if `device` is the CPU and does not stand for another device."""
    return device.type == "cpu" and not _ELSEWHERE.get()


@contextmanager
def standing_for(device: torch.device) -> Iterator[None]:
    """A context in which tensors on the CPU are treated as if they were on `device`. torch has no fake tensors of a GPU with a
    backward pass where there is no GPU."""
    before = _ELSEWHERE.set(device.type != "cpu")
    try:
        yield
    finally:
        _ELSEWHERE.reset(before)
