"""Stage g: whole runs, as a user starts them: 1B, 8B in NF4 on a GPU capped at 8, 12 and 24 GB, and streamed within a budget."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from harness.made_up_model import write_model, write_rows

from first_hour.findings import Findings
from first_hour.process import Started, wait
from first_hour.shapes import shape_of

STEPS, BATCH, LENGTH = 8, 8, 512
STREAMED = "3.2GiB"  # 3.4 GB
QUICK = ("--data.chat_template", "off", "--train.learning_rate", "0.0001", "--evaluate.answers", "0",
         "--evaluate.drift_texts", "0", "--evaluate.resamples", "200", "--evaluate.baselines", "false")  # fmt: skip


def run(found: Findings) -> None:
    rows = write_rows(found.folder / "rows.jsonl", 48 if found.toy else 96, words=0 if found.toy else 2 * LENGTH)
    if found.toy:
        small = write_model(shape_of("1B", toy=True), found.folder / "small", "cpu")
        found.attempt("1B, whole", lambda: _run(found, small, rows, 0))
        return
    found.attempt("1B, whole", lambda: _run(found, _folder(found, "1B"), rows, 0))
    folder = found.attempt("8B written", lambda: str(_folder(found, "8B")))
    if not isinstance(folder, str):
        return
    nf4 = ("--model.quantize", "nf4")
    keep = ("--memory.budget", STREAMED, "--memory.keep")
    for name, cap, more in (
        ("8B nf4, 12 GB", 12, nf4), ("8B nf4, budget 3.4 GB, host", 0, (*nf4, *keep, "host")), ("8B nf4, 8 GB", 8, nf4),
        ("8B nf4, budget 3.4 GB, disk", 0, (*nf4, *keep, "disk")), ("8B nf4, 24 GB", 24, nf4),
    ):  # fmt: skip
        if found.left < 40:
            found.add(name, {"not_run": "no time was left"})
            continue
        found.attempt(name, lambda cap=cap, more=more: _run(found, Path(folder), rows, cap * 10**9, *more))


def _folder(found: Findings, model: str) -> Path:
    return write_model(shape_of(model, toy=found.toy), found.folder / model, found.device)


def _run(found: Findings, model: Path, rows: Path, cap: int, *more: str) -> dict[str, Any]:
    """How a run ends, with its memory, planned and used, and the tokens a second of a step."""
    number = len(found.values)
    out, log = found.folder / f"run{number}", found.folder / f"run{number}.log"
    steps, batch, length = (2, 4, 64) if found.toy else (STEPS, BATCH, LENGTH)
    command = ["finetune", "--model", str(model), "--data.train", str(rows), "--out", str(out), "--data.max_tokens", str(length)]
    command += ["--train.steps", str(steps), "--train.evaluate_every", str(steps), "--train.batch_size", str(batch), *QUICK]
    command += more
    command += ["--model.device", str(found.device)] + (["--model.dtype", "float32"] if found.toy else [])
    how = wait(Started("first_hour.one_run", [str(cap), *command], log), max(1.0, found.left - 3))
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    print(said)
    if how != "done":
        return {"failed": " ".join([how, *said.strip().splitlines()[-2:]])[:600]}
    return ended(out) | {"memory_line": next((line for line in said.splitlines() if line.startswith("Memory: ")), "")}


def ended(out: Path) -> dict[str, Any]:
    """What a run folder says of its run."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line]
    certificate = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
    return {
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steps[1:] or steps),
        "last_loss": steps[-1]["loss"], "certificate_passed": certificate["passed"], "memory": report["memory"],
        "speed": report["speed"], "bytes_within_budget": _within(report["memory"]),
    }  # fmt: skip


def _within(memory: list[dict[str, Any]]) -> int | None:
    """The peak that a budget bounds: on a GPU that device's; None without a budget."""
    return next((use["used"] for use in memory if use["what"].endswith("against memory.budget")), None)
