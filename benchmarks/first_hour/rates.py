"""Stage a: versions, the rate of a plain product, of copies, and what a launch costs the host."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from harness.device_clock import PROBE, rate, seconds
from harness.machine import origin
from harness.steps import PACKAGES, installed
from torch import Tensor

from first_hour.findings import Findings
from lorakeet.models.nvidia import find_nvidia_gpus

LAUNCHES = 300  # in a row, of which the host's time is measured


def run(found: Findings) -> None:
    found.add("versions", {"python": platform.python_version(), **installed((*PACKAGES, "liger_kernel", "diffusers"))})
    found.add("machine", origin())
    found.add("card", _card(found))
    probe = 64 if found.toy else PROBE
    found.attempt("product_flops", lambda: rate(found.device, probe=probe, dtype=found.dtype))
    found.attempt("copies_bytes_per_second", lambda: _copies(found))
    found.attempt("torch_launch_seconds", lambda: _of_host(found, torch.zeros(64, device=found.device).add_, 1.0))


def _card(found: Findings) -> dict[str, Any]:
    if found.toy:
        return {"name": found.card()}
    about = torch.cuda.get_device_properties(found.device)
    free, total = torch.cuda.mem_get_info(found.device)
    return {
        "name": about.name, "capability": f"{about.major}.{about.minor}", "bytes": total, "free_bytes": free,
        "processors": about.multi_processor_count, "driver": find_nvidia_gpus().driver, "cuda": torch.version.cuda,
    }  # fmt: skip


def _copies(found: Findings) -> dict[str, float]:
    """Bytes a second; a copy on the device reads and writes, so that its bytes count twice."""
    size = 1 << 20 if found.toy else 1 << 30
    on_device = [torch.zeros(size, dtype=torch.uint8, device=found.device) for _ in range(2)]
    pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=not found.toy)
    pageable = torch.zeros(size, dtype=torch.uint8)
    ways: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "on the device": (2, lambda: on_device[0].copy_(on_device[1])),
        "pinned memory to the device": (1, lambda: on_device[0].copy_(pinned, non_blocking=True)),
        "the device to pinned memory": (1, lambda: pinned.copy_(on_device[0], non_blocking=True)),
        "pageable memory to the device": (1, lambda: on_device[0].copy_(pageable)),
    }
    return {name: times * size / seconds(copy, 5, found.device) for name, (times, copy) in ways.items()}


def _of_host(found: Findings, action: Callable[..., Any], *given: Any) -> float:
    """Seconds of the host for a launch, while the queue is not full."""
    action(*given)
    found.synchronize()
    count = 10 if found.toy else LAUNCHES
    began = time.perf_counter()
    for _ in range(count):
        action(*given)
    taken = (time.perf_counter() - began) / count
    found.synchronize()
    return taken
