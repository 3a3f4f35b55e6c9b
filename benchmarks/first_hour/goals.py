"""The goals of the first hour on one H100, each with what was measured: met, missed or not measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

GB = 10**9
OURS = ("lorakeet", "lorakeet, CUDA graphs", "lorakeet, kernels triton")  # Lorakeet's own ways
PEERS = ("PEFT + Liger", "PEFT + Liger, checkpointing")
Stages = Mapping[str, Mapping[str, Any]]  # what each stage found, by its key


@dataclass(frozen=True)
class Goal:
    """A bound in words, and the number that is compared with it (None: not measured)."""

    words: str
    bound: float
    value: Callable[[Stages], float | None]
    above: bool = True  # the number is to be at least the bound; else at most

    def compared(self, stages: Stages) -> dict[str, Any]:
        found = self.value(stages)
        met = None if found is None else (found >= self.bound if self.above else found <= self.bound)
        return {"goal": self.words, "bound": self.bound, "measured": found, "met": met}


def number(stages: Stages, stage: str, *path: str) -> float | None:
    """The number at that place of what a stage found; None if it is not there."""
    at: Any = stages.get(stage, {}).get("found", {})
    for name in path:
        at = at.get(name) if isinstance(at, Mapping) else None
    return float(at) if isinstance(at, (int, float)) and not isinstance(at, bool) else None


def _speed(case: str) -> Callable[[Stages], float | None]:
    """The best of Lorakeet's own ways."""

    def best(stages: Stages) -> float | None:
        found = [number(stages, "d", f"{way}, {case}", "4096", "tokens_per_second") for way in OURS]
        return max((each for each in found if each is not None), default=None)

    return best


def _largest_gap(stages: Stages) -> float | None:
    found = stages.get("c", {}).get("found", {})
    return max((value for name, value in found.items() if name.endswith("largest gap")), default=None)


def _waits(stages: Stages) -> float | None:
    found = stages.get("e", {}).get("found", {}).values()
    counts = [each["waits_a_step"] for each in found if isinstance(each, Mapping) and each.get("waits_a_step") is not None]
    return max(counts, default=None)


def over_plan(stages: Stages) -> list[float]:
    """Of each case, by how much of what Lorakeet took its plan was larger; below 0: the plan was too small."""
    found = stages.get("d", {}).get("found", {})
    shares = []
    for name, value in found.items():
        if not name.startswith("planned, ") or not isinstance(value, Mapping) or "train step" not in value:
            continue
        model, base, tokens = name.removeprefix("planned, ").split(", ")
        used = number(stages, "d", f"lorakeet, {model}, {base}", tokens, "process_bytes")
        if used:
            shares.append((value["train step"] - used) / used)
    return shares


GOALS = (
    Goal("8B, dense, packs of 4,096: tokens a second", 15_000, _speed("8B, none")),
    Goal("8B, NF4, packs of 4,096: tokens a second", 13_000, _speed("8B, nf4")),
    Goal("1B, dense, packs of 4,096: tokens a second", 80_000, _speed("1B, none")),
    Goal("8B, NF4, streamed within 3.4 GB, rows of 512: tokens a second", 1_130,
         lambda stages: number(stages, "g", "8B nf4, budget 3.4 GB, host", "tokens_per_second")),
    Goal("largest gap between losses on the CPU and on the GPU, nats", 0.05, _largest_gap, above=False),
    Goal("most waits of the host in a step", 3, _waits, above=False),
    Goal("smallest surplus of a plan over what was taken", 0.0, lambda stages: min(over_plan(stages), default=None)),
    Goal("median surplus of a plan over what was taken", 0.1,
         lambda stages: median(found) if (found := over_plan(stages)) else None, above=False),
    Goal("SD 1.5 at batch 1: GB", 8.0, lambda stages: _gigabytes(stages, "SD 1.5"), above=False),
    Goal("SDXL at batch 1: GB", 8.0, lambda stages: _gigabytes(stages, "SDXL"), above=False),
)  # fmt: skip


def _gigabytes(stages: Stages, shape: str) -> float | None:
    found = number(stages, "i", shape, "peak_reserved_bytes")
    return None if found is None else found / GB


def failures(found: Any, where: str = "") -> list[str]:
    """Every part of what a stage found that failed, by its place, with what was said."""
    if not isinstance(found, Mapping):
        return []
    own = [f"{where or 'the stage'}: {found['failed']}"] if found.get("failed") else []
    return own + [line for name, value in found.items() for line in failures(value, f"{where}, {name}" if where else str(name))]
