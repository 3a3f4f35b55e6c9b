"""Claim: with adapters in the top layers alone, caching the hidden states below makes several epochs faster, and learns the same.

    python benchmarks/frozen_prefix.py [--layers top:8] [--epochs 3] [--limit 200] [--rounds 3] [--quick]

The quickstart's rows and settings, three ways: adapters in all layers; in the top ones, with every pass through all blocks; in
the top ones, with the hidden states below computed once for each row. Held-out evaluations and computing the states count. The
held-out loss of the first two shows the price of adapting fewer layers; the last two must learn the same. Every round has another
seed: another order of the rows, another A.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import origin, warn_if_busy, write_result
from harness.processes import rotated, run_module, summary

MODULE = "contenders.top_layers"
SAME = 0.01  # nats between the held-out losses with and without cached hidden states: rounding, enlarged by training


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", default="top:8")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--limit", type=int, default=200, help="rows of each file")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each way, in turns")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; every one has its own")
    parser.add_argument("--quick", action="store_true", help="40 rows, two epochs, one round, to see whether everything runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    if given.quick:
        given.limit, given.epochs, given.rounds = 40, 2.0, 1
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    ways = {"all layers": ["--layers", "all"], "top": ["--layers", given.layers], "kept": ["--layers", given.layers, "--kept"]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        result = Path(folder) / "result.json"
        for number in range(given.rounds):
            for name in rotated(list(ways), number):
                options = [str(result), *ways[name], "--epochs", str(given.epochs), "--limit", str(given.limit)]
                options += ["--seed", str(given.seed + number)]
                run_module(sys.executable, MODULE, options, log=Path(folder) / "log")
                found[name].append(json.loads(result.read_text(encoding="utf-8")))
                print(f"round {number + 1}: {name} {found[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    ratios = {
        name: summary(one["seconds"] / kept["seconds"] for one, kept in zip(found[name], found["kept"], strict=True))
        for name in ("all layers", "top")
    }
    gap = max(abs(a["held_out_loss"] - b["held_out_loss"]) for a, b in zip(found["top"], found["kept"], strict=True))
    for name, runs in found.items():
        one = runs[0]
        print(f"{name:11} {summary(r['seconds'] for r in runs).show(1):>20} s ({one['of_them_filling']:.1f} s for the states), "
              f"peak {one['peak_bytes'] / 1e9:.2f} GB, held-out loss {one['held_out_loss']:.4f} (base {one['base_loss']:.4f}), "
              f"{one['trained_parameters']:,} parameters")  # fmt: skip
    print(f"{given.layers} with cached hidden states is faster than without by {ratios['top'].show()}, than all layers by "
          f"{ratios['all layers'].show()}; held-out losses with and without differ by {gap:.5f} (at most {SAME})")  # fmt: skip
    kept_claim = gap <= SAME and ratios["top"].median > 1
    settings = {"layers": given.layers, "epochs": given.epochs, "limit": given.limit}
    content = {"settings": settings, "runs": found, "faster": {n: r.to_mapping() for n, r in ratios.items()}, "loss_gap": gap}
    claim, content["kept"] = "frozen_prefix_quick" if given.quick else "frozen_prefix", kept_claim
    print(f"Written: {write_result(claim, content, seed=given.seed, about=about, folder=given.results)}")
    return 0 if kept_claim else 1


if __name__ == "__main__":
    sys.exit(main())
