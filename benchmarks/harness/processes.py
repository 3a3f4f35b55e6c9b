"""Runs each measurement in a fresh Python process, and summarises repeated numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
# Nothing asks a server, and nothing uses a GPU: the claims are about the CPU.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
}


class Failed(Exception):
    """A process that ended with an error; the message holds the end of what it printed."""


@dataclass(frozen=True)
class Summary:
    """Repeated measurements of one number."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    def to_mapping(self) -> dict[str, object]:
        return {"median": self.median, "min": min(self.values), "max": max(self.values), "n": len(self.values)}

    def show(self, digits: int = 2) -> str:
        """median (min-max), or the one number there is."""
        if len(self.values) == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({min(self.values):.{digits}f}-{max(self.values):.{digits}f})"


def summary(values: Iterable[float]) -> Summary:
    return Summary(tuple(values))


def environment(*, gpu: bool = False) -> dict[str, str]:
    """This process's environment with QUIET, and with benchmarks/ importable beside what PYTHONPATH names already.

    With `gpu` a CUDA device is visible.
    """
    there = os.environ.get("PYTHONPATH", "")
    quiet = {name: value for name, value in QUIET.items() if not (gpu and name == "CUDA_VISIBLE_DEVICES")}
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *([there] if there else [])])}


def run_module(python: str, module: str, arguments: Sequence[str], *, log: Path, gpu: bool = False) -> float:
    """Seconds that `python -m module arguments` took; its output goes to `log`. Raises Failed with the end of it."""
    return run([python, "-m", module, *arguments], log=log, gpu=gpu)


def answered(module: str, asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What `python -m module ASKED.json FOUND.json` wrote, in a fresh process of this Python; its files are in `folder`."""
    given, result = folder / "asked.json", folder / "found.json"
    given.write_text(json.dumps(asked), encoding="utf-8")
    run_module(sys.executable, module, [str(given), str(result)], log=folder / "log.txt")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def run(command: Sequence[str], *, log: Path, gpu: bool = False) -> float:
    """Seconds that `command` took in benchmarks/'s environment; its output goes to `log`. Raises Failed with the end of it."""
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(
            command, env=environment(gpu=gpu), cwd=log.parent, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    seconds = time.perf_counter() - began
    if code:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        raise Failed(f"{' '.join(command)} ended with code {code}:\n" + "\n".join(tail))
    return seconds


def rotated(names: Sequence[str], round_number: int) -> list[str]:
    """The names in the order of that round: every contender is first once before one is first again."""
    shift = round_number % len(names)
    return [*names[shift:], *names[:shift]]
