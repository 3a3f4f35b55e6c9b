"""Claim: training over int8 weights with products in int8 is faster than in bf16, and no difference on the test rows is shown.

    python benchmarks/int8_products.py [--steps 8] [--seeds 0 1] [--one-thread]

Three ways to train the shipped run: over the weights as they are; over int8 weights dequantised for each product; over int8
weights multiplied in int8, forward and backward. Loss curves are shown side by side. The best step of each is evaluated on the
379 test rows (always with exact products), and compared with the first way row by row. Scores are no timings: a busy machine does
not change them, and with --one-thread no speed is claimed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from harness.machine import origin, warn_if_busy, write_result
from harness.processes import rotated, run_module, summary

from lorakeet.evaluate.answers import Answers, measure
from lorakeet.evaluate.compare import Comparison, compare_answers
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.values import encode

MODULE = "contenders.int8_run"
DENSE, BACK, INT8 = "as they are", "int8, brought back", "int8 products"
WAYS = {DENSE: [], BACK: ["--method", "int8"], INT8: ["--method", "int8", "--products"]}
CURVE = 6  # points of the loss curve that are shown


def answers_of(way: str, found: Mapping[str, Any]) -> Answers:
    return Answers(way, tuple(found["labels"]), np.array(found["truth"]), np.array(found["log_probs"]))


def compared(by_way: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Comparison]]:
    """Each other way against the weights as they are, on the same test rows."""
    first = answers_of(DENSE, by_way[DENSE])
    others = {way: answers_of(way, found) for way, found in by_way.items() if way != DENSE}
    return {way: list(compare_answers(answers, first, EvaluateSpec())) for way, answers in others.items()}


def speed(found: Mapping[str, Any]) -> float:
    """Tokens a second over the timed steps."""
    return float(sum(found["tokens"]) / sum(found["seconds"]))


def show(runs: Mapping[str, list[dict[str, Any]]], comparisons: Sequence[Mapping[str, list[Comparison]]], timed: bool) -> None:
    print(f"{'':20} {'tokens/s':>18} {'peak GB':>8} {'accuracy':>9} {'log-loss':>9}  mean loss over the steps")
    for way, found in runs.items():
        metrics = measure(answers_of(way, found[0]), EvaluateSpec())
        losses = np.array_split(np.array(found[0]["losses"]), min(CURVE, len(found[0]["losses"])))
        curve = " ".join(f"{part.mean():.3f}" for part in losses)
        rates = summary(map(speed, found)).show(0) if timed else "not timed"
        scores = f"{metrics['accuracy'].value:9.3f} {metrics['log_loss'].value:9.3f}"
        print(f"{way:20} {rates:>18} {found[0]['peak_bytes'] / 1e9:8.2f} {scores}  {curve}")
    for number, by_way in enumerate(comparisons):
        for way, items in by_way.items():
            for item in items:
                gap = item.difference
                shown = f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}], {item.verdict}"
                print(f"seed {number}: {way} - {DENSE}: {item.metric} {shown}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=0, help="of each run; 0: as the run file says")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--one-thread", action="store_true", help="scores alone are claimed: the machine may be busy")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about, timed = origin(), not given.one_thread
    if timed:
        print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        result = Path(folder) / "result.json"
        for number, seed in enumerate(given.seeds):
            for way in rotated(list(WAYS), number):
                options = [str(result), *WAYS[way], "--steps", str(given.steps), "--seed", str(seed)]
                run_module(sys.executable, MODULE, options, log=Path(folder) / "log")
                runs[way].append(json.loads(result.read_text(encoding="utf-8")))
                print(f"seed {seed}: {way}", file=sys.stderr, flush=True)
    comparisons = [compared({way: found[number] for way, found in runs.items()}) for number in range(len(given.seeds))]
    show(runs, comparisons, timed)
    worse = [item for by_way in comparisons for item in by_way[INT8] if item.verdict == "worse"]
    ratio = summary(speed(new) / speed(old) for new, old in zip(runs[INT8], runs[DENSE], strict=True)) if timed else None
    kept = not worse and (ratio is None or ratio.median > 1)
    content = {
        "steps": given.steps, "seeds": given.seeds, "kept": kept,
        "faster": None if ratio is None else ratio.to_mapping(),
        "comparisons": [{way: [encode(item) for item in items] for way, items in by_way.items()} for by_way in comparisons],
        "runs": runs,
    }  # fmt: skip
    claim = "int8_products" if timed else "int8_products_scores"
    print(f"Written: {write_result(claim, content, seed=given.seeds[0], about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
