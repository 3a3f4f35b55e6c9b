"""Claim: *modules* fails at most 1 of 1,000 right servers, and calls at most 1 of 1,000 missing modules active.

    python benchmarks/module_errors.py [--draws 2000] [--seed 0]

Nothing is loaded: the effects of 24 modules, and a server's rounding, are drawn at random. Effects share a part of their size,
0.4 or 0.95. Rounding has heavy tails, and parts that are common to a place and to a row. A row's part also lies along the
adapter's scale (3 % of it), or all rows' does (1 %, which float16 may do). Servers lack one module, two, every second, or any
number of any. Printed are how often right servers fail, and of servers with faults: missing modules called active, named, present
ones called missing, and servers that fail. No timing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness.machine import RESULTS, origin, write_result

from lorakeet.evaluate.intervals import Floats
from lorakeet.evaluate.served.module_activity import ActivityFound, EffectValues, LeftOut, Modules, find_activity

COUNT, PLACES, TOKENS = 24, 48, 8
NAMES = [f"block.{number // 4}.m{number % 4}" for number in range(COUNT)]
SETS = [frozenset(NAMES[number : number + 4]) for number in range(0, COUNT, 4)]
SETS += [*(frozenset(NAMES[number::4]) for number in range(4)), frozenset(NAMES)]
ROWS, COMMON, NOISE = (4, 8, 16), (0.4, 0.95), (0.02, 0.3, 1.0)
FORMAT = 0.01  # a scale that is so much of itself off is float16's
MOST = 1e-3  # of certificates, and of missing modules


@dataclass(frozen=True)
class Rounding:
    """What a server's rounding is, of a module's usual effect and of the scale."""

    noise: float = 0.3
    by_row: float = 0.03
    everywhere: float = 0.0


class DrawnServer:
    """Effects of modules at places that amplify every change, and the differences of a server that rounds."""

    def __init__(self, seed: int, rows: int, common: float = 0.4, rounding: Rounding = Rounding()) -> None:
        chance, count = np.random.default_rng([seed, rows]), PLACES * TOKENS
        self.places = np.repeat(np.arange(PLACES), TOKENS)
        self.rows = self.places * rows // PLACES
        amplify = np.exp(chance.normal(0, 0.7, PLACES))[self.places] * np.exp(chance.normal(0, 0.3, count))
        own, shared = chance.normal(size=(COUNT, count)), chance.normal(size=count)
        strength = np.exp(chance.normal(0, 0.7, (COUNT, 1)))
        self.effects = 0.02 * strength * amplify * (math.sqrt(1 - common**2) * own + common * shared)
        self.scale = self.effects.sum(0)
        by_place, alone = chance.standard_t(4, PLACES)[self.places], chance.standard_t(4, count)
        noise = 0.7 * by_place + 0.7 * alone + 0.5 * chance.normal(size=rows)[self.rows]
        along = rounding.everywhere + rounding.by_row * chance.normal(size=rows)[self.rows]
        self.apart = 0.02 * rounding.noise * amplify * noise + along * self.scale

    def together(self, modules: Modules) -> Floats:
        """The effect of leaving out several modules."""
        return self.effects[[NAMES.index(name) for name in modules]].sum(0)

    def found(self, missing: Modules = frozenset()) -> ActivityFound:
        """What is shown of the server if it lacks these modules."""
        apart = self.apart + self.together(missing) if missing else self.apart
        known = LeftOut(dict(zip(NAMES, self.effects, strict=True)), self.scale, SETS, self.together)
        return find_activity(EffectValues.of(apart, self.places, self.rows, self.effects), known)


def fails(found: ActivityFound) -> bool:
    """Whether the check fails."""
    return found.faults > 0 or abs(found.scale - 1) > found.scale_limit(FORMAT)


def drawn_fault(seed: int, kind: str) -> Modules:
    """The modules that a server lacks: one, two, every second, or any."""
    chance = np.random.default_rng([seed, 1])
    if kind == "every second":
        return frozenset(NAMES[::2])
    count = {"one": 1, "two": 2}.get(kind) or int(chance.integers(2, COUNT))
    return frozenset(chance.choice(NAMES, count, replace=False).tolist())


def right_servers(seeds: Sequence[int], rows: int, rounding: Rounding) -> dict[str, float]:
    """Of right servers: how many fail, and the share of modules that are called active."""
    every = [DrawnServer(seed, rows, rounding=rounding).found() for seed in seeds]
    active = sum(len(found.active) for found in every) / len(every) / COUNT
    return {"servers": len(every), "failed": sum(map(fails, every)), "active": active}


def wrong_servers(seeds: Sequence[int], rows: int, common: float, noise: float, kind: str) -> dict[str, float]:
    """Of servers with one kind of fault: what was said of the modules that they lack, and of the others."""
    total = dict.fromkeys(("lacking", "called active", "named", "there", "called missing", "there and active", "failed"), 0)
    for seed in seeds:
        missing = drawn_fault(seed, kind)
        found = DrawnServer(seed, rows, common, Rounding(noise, by_row=0.01)).found(missing)
        counts = (
            len(missing), len(missing & set(found.active)), len(missing & set(found.missing)), COUNT - len(missing),
            len(set(found.missing) - missing), len(set(found.active) - missing), int(fails(found)),
        )  # fmt: skip
        total = {name: before + more for (name, before), more in zip(total.items(), counts, strict=True)}
    return {"servers": len(seeds), **total}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000, help="right servers of a kind; of wrong ones a tenth")
    parser.add_argument("--seed", type=int, default=0, help="of the first server")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    given = parser.parse_args(arguments)
    about, seeds = origin(), range(given.seed, given.seed + given.draws)
    few, right, wrong = seeds[: max(given.draws // 10, 1)], dict[str, Any](), dict[str, Any]()
    for rows in ROWS:
        for name, rounding in (("3 % by row", Rounding()), ("1 % everywhere", Rounding(0.05, 0.0, 0.01))):
            right[f"{rows} rows, {name}"] = right_servers(seeds, rows, rounding)
            print(rows, name, right[f"{rows} rows, {name}"], flush=True)
        for common in COMMON:
            for noise in NOISE:
                for kind in ("one", "two", "every second", "any"):
                    name = f"{rows} rows, {common} in common, noise {noise}, {kind}"
                    wrong[name] = wrong_servers(few, rows, common, noise, kind)
                    print(name, wrong[name], flush=True)
    failed, servers = (sum(one[name] for one in right.values()) for name in ("failed", "servers"))
    called, lacking = (sum(one[name] for one in wrong.values()) for name in ("called active", "lacking"))
    print(f"{failed} of {servers} right servers failed; {called} of {lacking} missing modules were called active")
    content = {"right": right, "wrong": wrong, "false alarms": failed / servers, "false active": called / lacking}
    print(write_result("module_errors", content, seed=given.seed, about=about, folder=given.results))
    return int(failed > MOST * servers or called > MOST * lacking)


if __name__ == "__main__":
    raise SystemExit(main())
