"""Claim: 8 adapters in one run take at most 1.25 times one run's memory, and 1.5 times the throughput of 8 successive runs.

    python benchmarks/many_adapters.py [--quick] [--memory] [--rounds 3] [--members 8]

The throughput is claimed where single batches are small: steps of 1 and 2 rows of at most 40 tokens, 30 on average. A step of one
whole review, 107 tokens on average, already keeps a small CPU busy; it is measured too, as are 2 of them and the quickstart's 16.
For comparison, as many processes run at once, with the cores divided between their threads. Every process is fresh; SmolLM2-135M,
rank 8 on all linear layers, shipped reviews. Steps are timed from the third one on. --memory measures memory alone, which a busy
machine does not change; every process then uses as many threads as a run does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import origin, warn_if_busy, write_result
from harness.processes import Failed, environment, rotated, run_module, summary

MODULE = "contenders.many_members"
MEMORY, FASTER = 1.25, 1.5  # the promise
SHORT = 40  # tokens a row
SMALL = ((1, SHORT), (2, SHORT))  # rows of a step, and tokens of the longest, where throughput is promised
WHOLE = 16  # rows of the quickstart's step
LARGER = ((1, None), (2, None), (WHOLE, None))
UNTIMED = 2  # steps in which kernels are made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of 4 steps, without separate processes: 5 minutes")
    parser.add_argument("--memory", action="store_true", help="memory only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    if not given.memory:
        print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    steps, rounds = (4, 1) if given.quick else (given.steps, given.rounds)
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        bench = Bench(Path(folder), given.members, steps)
        memory = bench.memory()
        loads = [] if given.memory else [Load(*load) for load in (*SMALL, *LARGER)]
        speed = [bench.speed(load, rounds, processes=not given.quick) for load in loads]
    content: dict[str, Any] = {"members": given.members, "steps": steps, "memory": memory, "speed": speed}
    faster = all(one["against_one_by_one"]["median"] >= FASTER for one in speed if (one["batch"], one["longest"]) in SMALL)
    kept = memory["ratio"] <= MEMORY and faster
    _show(content)
    claim = "many_adapters_memory" if given.memory else "many_adapters"
    claim += "_quick" if given.quick else ""
    print(f"Written: {write_result(claim, {**content, 'kept': kept}, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


@dataclass(frozen=True)
class Load:
    """What a step trains on: so many rows, of any length or of at most `longest` tokens each."""

    batch: int
    longest: int | None = None

    def flags(self, steps: int) -> list[str]:
        """As contenders.many_members takes them; four times as many of the short steps, which are quickly done."""
        if self.longest is None:
            return ["--batch", str(self.batch), "--steps", str(steps)]
        return ["--batch", str(self.batch), "--steps", str(4 * steps), "--longest", str(self.longest)]


class Bench:
    """The processes of one benchmark, in `folder`."""

    def __init__(self, folder: Path, members: int, steps: int) -> None:
        self.folder, self.members, self.steps, self._count = folder, members, steps, 0

    def memory(self) -> dict[str, Any]:
        """Peaks of one run by the ordinary loop, of all members in one pass, and of separate processes, at 16 rows a step, with a
        held-out evaluation, so that each member keeps its best values too."""
        one, many = self._one(Load(WHOLE), "--held-out"), self._many(Load(WHOLE), "--held-out")
        return {
            "batch": WHOLE,
            "one_bytes": one["peak_bytes"],
            "together_bytes": many["peak_bytes"],
            "separate_bytes": self.members * one["peak_bytes"],
            "loaded_bytes": one["loaded_bytes"],
            "ratio": many["peak_bytes"] / one["peak_bytes"],
        }

    def speed(self, load: Load, rounds: int, *, processes: bool) -> dict[str, Any]:
        """Tokens a second with steps of `load`: one run (successive runs have the same rate), all in one pass, all at once."""
        found: dict[str, list[float]] = {"one by one": [], "together": [], "processes": []}
        ways = {"one by one": self._one, "together": self._many}
        for number in range(rounds):
            for name in rotated(list(ways), number):
                found[name].append(_rate(ways[name](load)))
            if processes:
                found["processes"].append(sum(map(_rate, self._at_once(load))))
        ratios = {
            f"against_{name.replace(' ', '_')}": summary(
                many / other for many, other in zip(found["together"], found[name], strict=True)
            ).to_mapping()
            for name in ("one by one", "processes") if found[name]
        }  # fmt: skip
        rates = {name: summary(values).to_mapping() for name, values in found.items() if values}
        return {"batch": load.batch, "longest": load.longest, "tokens_per_second": rates, **ratios}

    def _one(self, load: Load, *flags: str) -> dict[str, Any]:
        return self._run(["--loop", *load.flags(self.steps), *flags])

    def _many(self, load: Load, *flags: str) -> dict[str, Any]:
        return self._run(["--members", str(self.members), *load.flags(self.steps), *flags])

    def _run(self, arguments: list[str]) -> dict[str, Any]:
        self._count += 1
        result = self.folder / f"{self._count}.json"
        print(" ".join(arguments), file=sys.stderr, flush=True)
        given = [str(result), *arguments]
        run_module(sys.executable, MODULE, given, log=result.with_suffix(".log"))
        return json.loads(result.read_text(encoding="utf-8"))

    def _at_once(self, load: Load) -> list[dict[str, Any]]:
        """As many processes as members, started together, with the cores shared between them."""
        threads = max(1, (os.cpu_count() or 1) // self.members)
        print(f"{self.members} processes of {threads} threads, {' '.join(load.flags(self.steps))}", file=sys.stderr, flush=True)
        self._count += 1
        results = [self.folder / f"{self._count}-{number}.json" for number in range(self.members)]
        running = []
        for number, result in enumerate(results):
            command = [sys.executable, "-m", MODULE, str(result), "--loop", "--seed", str(number)]
            command += load.flags(self.steps)
            with result.with_suffix(".log").open("w") as log:
                threaded = {**environment(), "OMP_NUM_THREADS": str(threads)}
                running.append(subprocess.Popen(command, env=threaded, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT))
        for process, result in zip(running, results, strict=True):
            if process.wait():
                raise Failed(result.with_suffix(".log").read_text(encoding="utf-8")[-2000:])
        return [json.loads(result.read_text(encoding="utf-8")) for result in results]


def _rate(found: dict[str, Any]) -> float:
    """Tokens a second over the steps that are timed."""
    return float(sum(found["tokens"][UNTIMED:]) / sum(found["seconds"][UNTIMED:]))


def _show(content: dict[str, Any]) -> None:
    memory = content["memory"]
    print(f"\nPeak memory: one run {memory['one_bytes'] / 1e9:.2f} GB (loaded {memory['loaded_bytes'] / 1e9:.2f}), "
          f"{content['members']} adapters in one run {memory['together_bytes'] / 1e9:.2f} GB: {memory['ratio']:.2f} times; "
          f"{content['members']} processes {memory['separate_bytes'] / 1e9:.2f} GB")  # fmt: skip
    for one in content["speed"]:
        rates = ", ".join(f"{name} {found['median']:.0f}" for name, found in one["tokens_per_second"].items())
        ratios = ", ".join(f"{one[key]['median']:.2f} {key.replace('_', ' ')}" for key in one if key.startswith("against"))
        rows = "rows a step" if one["longest"] is None else f"rows of at most {one['longest']} tokens a step"
        print(f"{one['batch']:>3} {rows}: tokens a second {rates}; together {ratios}")


if __name__ == "__main__":
    raise SystemExit(main())
