"""Claim: switching an image model between adapters takes the same however many are loaded; diffusers takes longer with each.

    python benchmarks/image_switching.py [--quick] [--rounds N]

The UNet of Stable Diffusion 1.5 with random weights in bf16, and adapters of rank 16 on its attention, in diffusers' format.
Timed are loading one more adapter, switching to another one, and the first step of the UNet after that, on small latents.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import origin, warn_if_busy, write_result
from harness.processes import answered, rotated, summary

MODULE = "contenders.image_switch"
CONTENDERS = ("lorakeet", "diffusers")
COUNTS = (3, 57)
MORE = 1.5  # by how much a switch may take longer with the most adapters than with the fewest


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 and 6 adapters, one round: does it run?")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each contender, in turns")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    counts, rounds = ((3, 6), 1) if given.quick else (COUNTS, given.rounds)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with TemporaryDirectory(prefix="lorakeet-bench-") as temporary:
        folder = Path(temporary)
        asked = {"files": str(folder / "adapters"), "counts": counts}
        answered(MODULE, {**asked, "who": "write"}, folder)
        for number in range(rounds):
            for name in rotated(CONTENDERS, number):
                found[name].append(answered(MODULE, {**asked, "who": name}, folder))
    grown = {name: growth(rounds, counts) for name, rounds in found.items()}
    show(found, counts)
    holds = grown["lorakeet"] <= MORE
    print(f"\nA switch with {counts[-1]} loaded takes {grown['lorakeet']:.2f}× what it takes with {counts[0]} (at most {MORE:g}; "
          f"diffusers {grown['diffusers']:.1f}×): {'holds' if holds else 'DOES NOT HOLD'}")  # fmt: skip
    content = {"counts": counts, "rounds": found, "growth": grown, "holds": holds}
    if not given.quick:
        print(f"Written: {write_result('image_switching', content, seed=0, about=about, folder=given.results)}")
    return 0 if holds else 1


def growth(rounds: Sequence[dict[str, Any]], counts: Sequence[int]) -> float:
    """The median over rounds of how much longer a switch takes with the most adapters than with the fewest."""
    return summary(middle(one, counts[-1], "switch_ms") / middle(one, counts[0], "switch_ms") for one in rounds).median


def middle(one: dict[str, Any], count: int, what: str) -> float:
    """The median of one process's timings."""
    return summary(one[str(count)][what]).median


def show(found: dict[str, list[dict[str, Any]]], counts: Sequence[int]) -> None:
    print(f"\n{'median milliseconds':20}" + "".join(f"{f'{count} loaded':>38}" for count in counts))
    for name, rounds in found.items():
        cells = [
            " / ".join(f"{summary(middle(one, count, what) for one in rounds).median:.1f}" for what in TIMED) for count in counts
        ]
        print(f"{name:20}" + "".join(f"{cell:>38}" for cell in cells) + "   (load / switch / step after it)")


TIMED = ("load_ms", "switch_ms", "step_ms")


if __name__ == "__main__":
    raise SystemExit(main())
