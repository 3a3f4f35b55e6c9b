"""What a contender measures of itself, and the main function that all contenders share. Plain Python, no torch."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.workload import Workload, read_workload

PACKAGES = (
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "unsloth", "unsloth_zoo", "bitsandbytes", "flash_attn",
    "triton", "lorakeet",
)  # fmt: skip


@dataclass
class StepLog:
    """Seconds and loss of each step, and the process's peak memory (VmHWM); with `gpu` the GPU's too."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)
    loaded_bytes: int = 0  # the peak until training begins: loading the model is a part of it
    before: float = 0.0  # seconds of training's own work before its first step
    last: float = 0.0
    gpu: bool = False
    gpu_loaded_bytes: int = 0  # the GPU's peak until training starts

    def begin(self) -> None:
        """Starts the clock of the first step. To be called before anything resets the system's own peak."""
        self.loaded_bytes = max(self.loaded_bytes, peak_bytes())
        if self.gpu:
            import torch

            self.gpu_loaded_bytes = torch.cuda.max_memory_allocated()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.last = time.perf_counter()

    def step(self) -> None:
        """Ends a step: its seconds run from the end of the one before it, whatever the library does in between."""
        if self.gpu:
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now

    def save_adapter(self, workload: Workload, write: Callable[[Path], object]) -> None:
        """Saves the adapter for evaluation after the steps that the workload names, outside the clock."""
        step = len(self.seconds)
        if step in workload.save_after:
            folder = Path(workload.saved) / f"{step}"
            folder.mkdir(parents=True)
            write(folder)
            self.last = time.perf_counter()

    def write(self, path: Path) -> None:
        import torch  # whatever the contender is, it stands on torch

        found = {
            "losses": self.losses,
            "seconds": self.seconds,
            "seconds_before": self.before,
            "peak_bytes": max(self.loaded_bytes, peak_bytes()),
            "peak_bytes_before_training": self.loaded_bytes,
            "threads": torch.get_num_threads(),
            "packages": installed(PACKAGES),
            "notes": self.notes,
        }
        if self.gpu:
            found["card_loaded_bytes"] = self.gpu_loaded_bytes
            found["card_peak_bytes"] = torch.cuda.max_memory_allocated()
            found["card_reserved_bytes"] = torch.cuda.max_memory_reserved()
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")


def contender(
    train: Callable[[Workload, str], StepLog], arguments: Sequence[str] | None = None, **ways: Callable[[Workload, str], StepLog]
) -> None:
    """Runs `train(workload, dtype)`, or the way that --way names, in this process and writes what it measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--way", choices=sorted(ways))
    parser.add_argument("--rows-at-once", type=int, help="of a step; all")
    given = parser.parse_args(arguments)
    saved, at_once = str(given.result.with_suffix("")), given.rows_at_once
    workload = replace(read_workload(given.workload), saved=saved, rows_at_once=at_once)
    log = ways.get(given.way, train)(workload, given.dtype)
    if not len(log.losses) == len(log.seconds) == len(workload.steps):
        raise SystemExit(f"{len(log.losses)} losses and {len(log.seconds)} times of {len(workload.steps)} steps were recorded")
    log.write(given.result)


def largest_difference(runs: Sequence[Mapping[str, Any]], like: Sequence[Mapping[str, Any]] | None) -> float | None:
    """The largest difference of one step's losses in any round; None where the one to compare with did not run."""
    if like is None:
        return None
    rounds = zip(runs, like, strict=False)  # of those that run once, the first
    return max(abs(a - b) for one, other in rounds for a, b in zip(one["losses"], other["losses"], strict=True))


def peak_bytes() -> int:
    """The most resident bytes of this process (VmHWM; getrusage where there is no /proc)."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM:"))


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed here."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
