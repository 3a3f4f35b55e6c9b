"""Claim: a second evaluation on the same rows takes at most half the time, with the same numbers: the base's answers are kept.

    python benchmarks/kept_answers.py [--run runs/drug-reviews] [--rounds 2]

Without --run, the quickstart is trained first, as `lorakeet quickstart` does. Then `lorakeet evaluate` is timed in alternated
pairs: with evaluate.reuse off, which computes all rows for base, few-shot base and adapter, and with it on.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import REPOSITORY, RESULTS, origin, warn_if_busy, write_result
from harness.processes import rotated, run, summary

SHARE = 0.5  # of the time that is allowed
WAYS = {"all computed": False, "base's answers kept": True}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="a finished run; else the quickstart is trained")
    parser.add_argument("--rounds", type=int, default=2, help="pairs of evaluations")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    with TemporaryDirectory() as name:
        work = Path(name)
        folder = given.run or work / "quickstart"
        if given.run is None:
            quickstart = [str(REPOSITORY / "examples/drug_reviews.yaml"), "--out", str(folder)]
            run([sys.executable, "-m", "lorakeet", "finetune", *quickstart], log=work / "training.log")
        evaluated(folder, "base's answers kept", work, -1)  # which writes them, if the run did not
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        values: dict[str, list[Any]] = {way: [] for way in WAYS}
        for number in range(given.rounds):
            for way in rotated(list(WAYS), number):
                took, found = evaluated(folder, way, work, number)
                seconds[way].append(took)
                values[way].append(found)
    every = [value for found in values.values() for value in found]
    equal = all(value == every[0] for value in every)
    medians = {way: summary(took) for way, took in seconds.items()}
    share = medians["base's answers kept"].median / medians["all computed"].median
    for way, numbers in medians.items():
        print(f"{way:24} {numbers.show(1)} s")
    print(f"{share:.2f} of the time ({SHARE} allowed); values of all systems equal: {'yes' if equal else 'NO'}")
    content = {"seconds": seconds, "share": share, "values_equal": equal, "run": str(folder.name), "values": every[0]}
    print(f"Written: {write_result('kept_answers', content, seed=0, about=about, folder=given.results)}")
    return 0 if equal and share <= SHARE else 1


def evaluated(folder: Path, way: str, work: Path, number: int) -> tuple[float, dict[str, float]]:
    """The seconds of one evaluation, and the accuracy or loss of every system."""
    given = re.sub(r"(?m)^  reuse: .*\n", "", (folder / "config.yaml").read_text(encoding="utf-8"))
    config, out = work / f"{WAYS[way]}.yaml", work / f"report-{WAYS[way]}-{number}"
    config.write_text(re.sub(r"(?m)^evaluate:$", f"evaluate:\n  reuse: {str(WAYS[way]).lower()}", given), encoding="utf-8")
    command = ["-m", "lorakeet", "evaluate", str(folder), "--config", str(config), "--out", str(out)]
    took = run([sys.executable, *command], log=work / "evaluation.log")
    systems = json.loads((out / "report.json").read_text(encoding="utf-8"))["systems"]
    return took, {one["name"]: next(iter(one["metrics"].values()))["value"] for one in systems}


if __name__ == "__main__":
    sys.exit(main())
