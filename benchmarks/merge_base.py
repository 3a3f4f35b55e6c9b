"""Claim: an adapter trained on a quantised base is merged into the base that measures better on the held-out rows.

    python benchmarks/merge_base.py [--runs RUN …] [--methods nf4 int8] [--steps 34]

For each quantisation, the shipped run file is trained on the quantised base (or finished RUNs are given). The result is what
`lorakeet merge --into auto` measures: the adapter over the original weights and over the dequantised ones, on the same held-out
rows, each with its interval, and the paired difference. Scores are no timings: a busy machine does not change them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import origin, write_result
from rich.console import Console

from lorakeet.config import read_run
from lorakeet.data.prepare import load_dataset
from lorakeet.evaluate.values import encode
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.verbs.finetune import finetune
from lorakeet.verbs.packing.base_choice import both_bases, choose_base
from lorakeet.verbs.quickstart import config_path

METRICS = ("log_loss", "accuracy", "macro_f1")


def trained(method: str, steps: int, folder: Path, console: Console) -> Path:
    """A run of the shipped file on a base in that way of quantising."""
    out = folder / method
    flags = {"model.quantize.method": method, "train.steps": str(steps), "evaluate.drift_texts": "0", "out": str(out)}
    finetune(read_run(config_path(), flags), console=console)
    return out


def measured(run: Path, console: Console) -> dict[str, Any]:
    """Both bases' metrics on the run's held-out rows, the paired differences (dequantised − original), and what was taken."""
    opened = open_adapter(run)
    choice = choose_base("auto", [opened], both_bases(opened), load_dataset(opened.config.data), console)
    return {
        "trained_on": opened.trained_on,
        "taken": choice.base,
        "why": choice.why,
        "metrics": {system.name: encode(system.metrics) for system in choice.systems},
        "dequantised_minus_original": {found.metric: encode(found) for found in choice.comparisons},
    }


def shown(value: Mapping[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="finished runs on a base that was quantised at load")
    parser.add_argument("--methods", nargs="+", choices=("nf4", "int8"), default=("nf4", "int8"), help="of the runs trained here")
    parser.add_argument("--steps", type=int, default=34, help="of each run that is trained here")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about, console = origin(), Console(stderr=True)
    with TemporaryDirectory() as folder:
        runs = given.runs or [trained(method, given.steps, Path(folder), console) for method in given.methods]
        found = {run.name: measured(run, console) for run in runs}
    print(f"{'run':8} {'metric':9} {'original':>22} {'dequantised':>22} {'difference':>24}")
    for name, values in found.items():
        for metric in METRICS:
            sides = [shown(values["metrics"][base][metric]) for base in ("original", "dequantised")]
            difference = shown(values["dequantised_minus_original"][metric]["difference"])
            print(f"{name:8} {metric:9} {sides[0]:>22} {sides[1]:>22} {difference:>24}")
        print(f"{name:8} {values['why']}")
    kept = all(better_is_taken(values) for values in found.values())
    print(f"The better one on the held-out rows was taken each time: {'yes' if kept else 'NO'}")
    content = {"runs": found, "steps": None if given.runs else given.steps, "kept": kept}
    print(f"Written: {write_result('merge_base', content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


def better_is_taken(values: Mapping[str, Any]) -> bool:
    """Whether the base that was taken has the lower log-loss."""
    losses = {base: metrics["log_loss"]["value"] for base, metrics in values["metrics"].items()}
    return bool(losses[values["taken"]] == min(losses.values()))


if __name__ == "__main__":
    sys.exit(main())
