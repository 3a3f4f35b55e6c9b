"""Whether code made for a CPU computes with a tensor; a rehearsal on the CPU may stand for a run on another device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ELSEWHERE = ContextVar("lorakeet_elsewhere", default=False)


def is_cpu(device: torch.device) -> bool:
    """Whether `device` is the CPU, and stands for itself."""
    return device.type == "cpu" and not _ELSEWHERE.get()


@contextmanager
def standing_for(device: torch.device) -> Iterator[None]:
    """A context in which tensors on the CPU go the way that tensors on `device` would: torch has no fake tensors of a GPU, with
    their backward pass, where no GPU is."""
    before = _ELSEWHERE.set(device.type != "cpu")
    try:
        yield
    finally:
        _ELSEWHERE.reset(before)
