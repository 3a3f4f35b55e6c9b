"""Claim: the studio's screen Fit answers within a second when a setting is moved.

Ten settings are moved one after the other, as a user would, through the studio's own workbench. The first answer says whether all
fits in memory; the last one has also what would help. What is remembered is what the moves before have left.

    python benchmarks/studio_fit.py [--rounds 3] [--model meta-llama/Llama-3.1-8B]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.machine import origin, warn_if_busy, write_result
from harness.processes import summary

from lorakeet.errors import LorakeetError
from lorakeet.studio.screens.fit import WORK
from lorakeet.studio.workbench import Workbench

WITHIN = 1.0  # seconds, the promise
MOVES: tuple[dict[str, str], ...] = (
    {"lora.rank": "32"},
    {"lora.rank": "64"},
    {"train.batch_size": "32"},
    {"train.learning_rate": "1e-4"},
    {"train.moments": "8bit"},
    {"model.quantize.method": "nf4"},
    {"data.max_tokens": "2048"},
    {"train.micro_tokens": "4096"},
    {"lora.target_modules": "attention"},
    {"lora.rank": "16"},
)


async def answered(bench: Workbench, settings: Mapping[str, str]) -> tuple[float, float]:
    """Seconds to the first and to the last answer. Raises LorakeetError for what cannot be planned."""
    start, first, last = time.perf_counter(), 0.0, 0.0
    async for found in bench.answers(WORK, settings):
        if "error" in found:
            raise LorakeetError(found["error"])
        if "part" in found:
            last = time.perf_counter() - start
            first = first or last
    return first, last


def pace() -> float:
    """Seconds of a loop that is always the same: a shared machine that does nothing else may still be slow."""
    start = time.perf_counter()
    sum(number for number in range(10_000_000))
    return time.perf_counter() - start


async def moved(model: str, machine: str) -> dict[str, tuple[float, float]]:
    """The seconds of the first plan, and of each move after it, in a new workbench."""
    bench, settings, found = Workbench(), {"model.path": model, "machine": machine}, {}
    try:
        bench.start()
        await asyncio.sleep(8)  # while the page is read
        found["first plan"] = await answered(bench, settings)
        for move in MOVES:
            settings |= move
            name, value = next(iter(move.items()))
            found[f"{name} {value}"] = await answered(bench, settings)
    finally:
        bench.close()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="workbenches, each with all moves")
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B", help="a model whose configuration is shipped, or a folder")
    parser.add_argument("--machine", default="gpu-24", help="as in `lorakeet plan --machine`")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    rounds, paces = [], []
    for _ in range(given.rounds):
        paces.append(pace())
        rounds.append(asyncio.run(moved(given.model, given.machine)))
    found = {
        name: {part: summary([one[name][place] for one in rounds]) for place, part in enumerate(("first", "last"))}
        for name in rounds[0]
    }
    print(f"\n{given.model} on {given.machine}: seconds to the first and to the last answer, of {given.rounds} rounds (min-max)")
    for name, parts in found.items():
        print(f"{name:34} {parts['first'].show(2):24} {parts['last'].show(2)}")
    print(f"{'a fixed loop, before each round':34} {summary(paces).show(2)}")
    late = [name for name, parts in found.items() if parts["first"].median > WITHIN]
    print(f"\nFirst answer within {WITHIN:g} s: {'yes' if not late else 'NO: ' + ', '.join(late)}")
    seconds = {name: {part: one.to_mapping() for part, one in parts.items()} for name, parts in found.items()}
    about_rounds = {"seconds": seconds, "fixed_loop": summary(paces).to_mapping()}
    content = {"model": given.model, "machine": given.machine, **about_rounds, "late": late}
    print(f"Written: {write_result('studio_fit', content, seed=0, about=about, folder=given.results)}")
    return 0 if not late else 1


if __name__ == "__main__":
    sys.exit(main())
