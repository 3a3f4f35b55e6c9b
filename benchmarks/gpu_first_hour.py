"""Runs the first hour on a GPU: all that Lorakeet claims of one, measured in stages, beside other programs. `make gpu` calls it.

    python benchmarks/gpu_first_hour.py [--out gpu-report] [--wheels gpu-wheels] [--stages a b c …] [--rehearse]

**Not run on a GPU yet.** Each stage has a process and a time limit of its own. What fails or is late is recorded, and the
next one goes on. After each value OUT/report.json is written anew, at the end OUT/index.html; OUT/log.txt has what was printed.
Stages that are named again replace their earlier findings in the report; others stay.

No network is needed: packages come from a folder of wheels, which `make gpu-wheels` fills where there is one, and models have
random weights in true shapes. With --rehearse every stage runs with small sizes on the CPU.

Ends with 0 if all stages ran, 1 if a part of one failed or was late, and 2 if nothing could be measured here; then nothing is
written, and an earlier report stays as it is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from first_hour.goals import GOALS, failures
from first_hour.page import page
from first_hour.process import DONE, FORKED, Started, wait
from first_hour.stages import STAGES, Stage

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ("torch", "lorakeet.verbs.finetune", "first_hour.contender", "first_hour.images", "first_hour.proofs",
             "first_hour.kernels", "first_hour.waits", "first_hour.speed", "first_hour.shards", "lorakeet.cli.main")  # fmt: skip
PATIENCE = 5  # times the limits, in a rehearsal: its machine may be busy with other work
MARGIN = 2.0  # seconds that a stage thinks to have less, to end what it has started by itself
LINES = 12  # of the log, of a stage that failed
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    given = _given(arguments)
    os.environ.update(QUIET)
    with TemporaryDirectory(prefix="lorakeet-gpu-", dir=given.scratch) as name:
        scratch = Path(name)
        if problem := prepared(given, scratch):
            print(f"Nothing was measured: {problem}", file=sys.stderr)
            return 2
        given.out.mkdir(parents=True, exist_ok=True)
        report = Report(given.out, rehearsal=given.rehearse)
        codes = [_run(stage, report, scratch, given) for stage in STAGES if stage.key in given.stages]
    report.finish()
    print(f"Written: {report.path} and {report.page}")
    for goal in report.content["goals"]:
        if goal["met"] is False:
            print(f"Missed: {goal['goal']}: {goal['measured']:.4g}, goal {goal['bound']:g}")
    return 0 if all(codes) else 1


def _given(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    out = Path(os.environ.get("OUT") or ROOT / "gpu-report")
    parser.add_argument("--out", type=Path, default=out, help="where the report is written")
    parser.add_argument("--wheels", type=Path, default=ROOT / "gpu-wheels", help="packages that this machine lacks")
    parser.add_argument("--stages", nargs="+", choices=[stage.key for stage in STAGES], default=[stage.key for stage in STAGES])
    parser.add_argument("--limit", type=float, help="seconds of every stage, in place of its own")
    parser.add_argument("--scratch", type=Path, help="where models are written: 20 GB (the system's folder)")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU, to show that everything runs")
    return parser.parse_args(arguments)


def prepared(given: argparse.Namespace, scratch: Path) -> str:
    """Installs the wheels for this run, and says why it cannot begin; empty if it can."""
    found: list[str] = []
    source = ROOT / "src"
    if source.is_dir():
        found.append(str(source))
    if given.wheels.is_dir() and (wheels := sorted(map(str, given.wheels.glob("*.whl")))) and not given.rehearse:
        site = scratch / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), *wheels]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            why = " ".join(ended.stderr.split())[-400:]
            return f"the wheels in {given.wheels} cannot be installed: {why} Fill it again: make gpu-wheels."
        found.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*found, os.environ.get("PYTHONPATH", "")]))
    if given.rehearse:
        return _preload(found)
    log = scratch / "environment.log"
    how = wait(Started("first_hour.environment", [str(given.wheels)], log), 120)
    said = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
    return "" if how == DONE else said.splitlines()[-1] if said else f"the check of the machine was {how}"


def _preload(folders: Sequence[str]) -> str:
    """Imports what the forked stages of a rehearsal need, without computing anything."""
    from first_hour.environment import refusal

    sys.path[:0] = folders
    if problem := refusal("gpu-wheels", toy=True):
        return problem
    os.environ.update({FORKED: "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"})
    for module in PRELOADED:
        importlib.import_module(module)
    importlib.import_module("torch").set_num_threads(1)
    return ""


class Report:
    """OUT/report.json, written anew with every value that a stage finds, and OUT/index.html."""

    def __init__(self, out: Path, *, rehearsal: bool) -> None:
        self.path, self.page, self.log = out / "report.json", out / "index.html", out / "log.txt"
        self.content: dict[str, Any] = {"stages": {}}
        if self.path.is_file():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
            if self.content.get("rehearsal") != rehearsal:
                self.content = {"stages": {}}
        self.content["rehearsal"] = rehearsal
        self.began, self.commit = datetime.now(timezone.utc).isoformat(timespec="seconds"), _commit()

    def put(self, stage: Stage, found: Mapping[str, Any], **how: Any) -> None:
        """Keeps a stage: what it has found, how it ended, and of which GPU and commit that is, since earlier stages stay."""
        value = {"title": stage.title, "began": self.began, "commit": self.commit, "said": "", **how, "found": found}
        stages = {**self.content["stages"], stage.key: value}
        self.content["stages"] = {each.key: stages[each.key] for each in STAGES if each.key in stages}
        self.content["goals"] = [goal.compared(self.content["stages"]) for goal in GOALS]
        _replace(self.path, json.dumps(self.content, indent=1) + "\n")

    def finish(self) -> None:
        _replace(self.page, page(self.content))


def _replace(path: Path, text: str) -> None:
    """Writes a file whole: this program may be ended at any moment."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _run(stage: Stage, report: Report, scratch: Path, given: argparse.Namespace) -> bool:
    """Runs a stage in its own process, and keeps in the report what it has found so far. Whether all of it ran to its end."""
    limit = given.limit or stage.seconds * (PATIENCE if given.rehearse else 1)
    print(f"{stage.key}. {stage.title} (at most {limit:g} s)", flush=True)
    path, began = scratch / f"{stage.key}.json", time.monotonic()
    for old in (path, path.with_suffix(".card")):
        old.unlink(missing_ok=True)
    seen = 0

    def keep(ended: str, said: str = "") -> None:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        card = path.with_suffix(".card")
        name = card.read_text(encoding="utf-8") if card.is_file() else "unknown"
        report.put(stage, found, seconds=time.monotonic() - began, limit=limit, ended=ended, said=said, card=name)

    def watch() -> None:
        nonlocal seen
        if path.is_file() and (changed := path.stat().st_mtime_ns) != seen:
            seen = changed
            keep("running")

    with report.log.open("a", encoding="utf-8") as log:
        log.write(f"\n== {stage.key}. {stage.title}\n")
    start = report.log.stat().st_size
    flags = ["toy"] if given.rehearse else []
    arguments = [stage.module, str(path), str(scratch), str(began + limit - MARGIN), *flags]
    how = wait(Started("first_hour.stage", arguments, report.log), began + limit - time.monotonic(), watch)
    said = ""
    if how != DONE:
        text = report.log.read_bytes()[start:].decode("utf-8", errors="replace")
        said = "\n".join(text.strip().splitlines()[-LINES:])
    keep(how, said)
    lost = failures(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})
    print("\n".join([f"   {how} after {time.monotonic() - began:.0f} s", *(f"   failed: {line}" for line in lost)]), flush=True)
    return how == DONE and not lost


if __name__ == "__main__":
    sys.exit(main())
