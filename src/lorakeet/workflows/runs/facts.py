"""The circumstances of a run, for its report: what ran, on which rows, with which versions, on what machine."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lorakeet import __version__

PACKAGES = ("torch", "transformers", "diffusers", "safetensors", "numpy", "scikit-learn")


def now() -> str:
    """The time in UTC, to the minute."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def versions() -> str:
    """lorakeet's own version, Python's and those of the packages that decide numbers."""
    found = [f"lorakeet {__version__}", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def machine(device: torch.device) -> str:
    """The processor or GPU, and how many threads of it torch uses."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {platform.system()}"
    return f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads, {platform.system()} {platform.machine()}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "CPU"
