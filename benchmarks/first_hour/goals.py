"""The goals of the first hour on one H100, each with what was measured: met, missed, met in part or not measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

GB = 10**9
OURS = "lorakeet"
PEERS = ("PEFT + Liger", "PEFT + Liger, checkpointing")
FAILED = "failed"
STREAMED = "8B nf4, budget 3.4 GB, host"
Stages = Mapping[str, Mapping[str, Any]]  # what each stage found, by its key


@dataclass(frozen=True)
class Goal:
    """A bound in words, and the number that is compared with it (None: not measured).

    `lacks` names the parts of a stage that failed or did not run: without them nothing is met. A
    goal of which nothing was measured is missed if a part failed.
    """

    words: str
    bound: float
    value: Callable[[Stages], float | None]
    lacks: Callable[[Stages], list[str]]
    above: bool = True  # the number is to be at least the bound; else at most

    def compared(self, stages: Stages) -> dict[str, Any]:
        found = self.value(stages)
        lacks = self.lacks(stages)
        met: bool | None
        if found is None:
            met = False if any(FAILED in line for line in lacks) else None
        else:
            met = found >= self.bound if self.above else found <= self.bound
            met = None if met and lacks else met
        return {"goal": self.words, "bound": self.bound, "measured": found, "met": met, "lacks": lacks}


def lacking(stage: str, belongs: Callable[[str], bool] = lambda _: True) -> Callable[[Stages], list[str]]:
    """The parts of a stage, of those names, that failed or did not run, and the stage if it did not end."""

    def lines(stages: Stages) -> list[str]:
        about = stages.get(stage, {})
        parts = {name: each for name, each in about.get("found", {}).items() if isinstance(each, Mapping) and belongs(name)}
        said = [f"{name}: {FAILED}" for name, each in parts.items() if each.get("failed")]
        said += [f"{name}: not run" for name, each in parts.items() if each.get("not_run")]
        ended = about.get("ended", "done")
        return said if ended == "done" else [*said, f"stage {stage}: {ended}"]

    return lines


def number(stages: Stages, stage: str, *path: str) -> float | None:
    """The number at that place of what a stage found; None if it is not there."""
    at: Any = stages.get(stage, {}).get("found", {})
    for name in path:
        at = at.get(name) if isinstance(at, Mapping) else None
    return float(at) if isinstance(at, (int, float)) and not isinstance(at, bool) else None


def _speed(case: str) -> Callable[[Stages], float | None]:
    return lambda stages: number(stages, "d", f"{OURS}, {case}", "4096", "tokens_per_second")


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
        used = number(stages, "d", f"{OURS}, {model}, {base}", tokens, "process_bytes")
        if used:
            shares.append((value["train step"] - used) / used)
    return shares


def _ways(case: str) -> Callable[[Stages], list[str]]:
    return lacking("d", f"{OURS}, {case}".__eq__)


def _of_plan(name: str) -> bool:
    return name.startswith("planned, ") or (name.startswith("lorakeet, ") and name.count(", ") == 2)


GOALS = (
    Goal("8B, dense, packs of 4,096: tokens a second", 15_000, _speed("8B, none"), _ways("8B, none")),
    Goal("8B, NF4, packs of 4,096: tokens a second", 13_000, _speed("8B, nf4"), _ways("8B, nf4")),
    Goal("1B, dense, packs of 4,096: tokens a second", 80_000, _speed("1B, none"), _ways("1B, none")),
    Goal("8B, NF4, streamed within 3.4 GB, rows of 512: tokens a second", 1_130,
         lambda stages: number(stages, "g", STREAMED, "tokens_per_second"), lacking("g", STREAMED.__eq__)),
    Goal("8B, NF4, streamed within 3.4 GB, rows of 512: GB", 3.2 * 2**30 / GB,
         lambda stages: _gigabytes(stages, "g", STREAMED, "bytes_within_budget"), lacking("g", STREAMED.__eq__), above=False),
    Goal("largest gap between losses on the CPU and on the GPU, nats", 0.05, _largest_gap,
         lacking("c", lambda name: "PU, " in name), above=False),
    Goal("most waits of the host in a step", 3, _waits, lacking("e"), above=False),
    Goal("smallest surplus of a plan over what was taken", 0.0, lambda stages: min(over_plan(stages), default=None),
         lacking("d", _of_plan)),
    Goal("median surplus of a plan over what was taken", 0.1,
         lambda stages: median(found) if (found := over_plan(stages)) else None, lacking("d", _of_plan), above=False),
    Goal("SD 1.5 at batch 1: GB", 8.0, lambda stages: _gigabytes(stages, "i", "SD 1.5", "peak_reserved_bytes"),
         lacking("i", "SD 1.5".__eq__), above=False),
    Goal("SDXL at batch 1: GB", 8.0, lambda stages: _gigabytes(stages, "i", "SDXL", "peak_reserved_bytes"),
         lacking("i", "SDXL".__eq__), above=False),
)  # fmt: skip


def _gigabytes(stages: Stages, stage: str, *path: str) -> float | None:
    found = number(stages, stage, *path)
    return None if found is None else found / GB


def failures(found: Any, where: str = "") -> list[str]:
    """Every part of what a stage found that failed, by its place, with what was said."""
    if not isinstance(found, Mapping):
        return []
    own = [f"{where or 'the stage'}: {found['failed']}"] if found.get("failed") else []
    return own + [line for name, value in found.items() for line in failures(value, f"{where}, {name}" if where else str(name))]
