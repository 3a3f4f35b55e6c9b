"""Seconds of work on a device by its own clock, and the rate of its fastest plain product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

PROBE = 8192  # rows and columns of the product


def seconds(action: Callable[[], object], repeats: int, device: torch.device | None = None) -> float:
    """Of one call, in a row of them, by the GPU's own clock; the host is ahead of it, except where launching takes longer.

    On a CPU (`device`) by the host's clock.
    """
    action()
    if device is not None and device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            action()
        return (time.perf_counter() - began) / repeats
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        action()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / repeats


def rate(device: torch.device, *, probe: int = PROBE, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOPs a second of the fastest plain product in `dtype`."""
    square = torch.randn(probe, probe, device=device, dtype=dtype)
    return 2 * probe**3 / min(seconds(lambda: torch.mm(square, square), 10, device) for _ in range(5))
