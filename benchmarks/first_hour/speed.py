"""Stage d: tokens a second, share of the measured rate, memory against the plan, host and GPU time; beside other programs."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from typing import Any

import torch
from contenders.packed_workload import SPREAD
from harness.device_clock import PROBE, rate
from harness.made_up_model import write_model
from rich.console import Console

from first_hour.contender import settings_of
from first_hour.findings import Findings
from first_hour.goals import OURS, PEERS
from first_hour.process import Started, wait
from first_hour.shapes import MODELS, shape_of
from lorakeet.verbs.options import PlanOptions
from lorakeet.verbs.plan import plan

CASES = (("8B", "none"), ("8B", "nf4"), ("1B", "none"), ("1B", "nf4"))  # the ones with a goal first
TOKENS = (4096, 2048)
STEPS, SKIPPED = 14, 4
LEAST = 20.0  # seconds that are left for another program to be started
MOST = 150.0  # that one may take
FOREIGN = ("trl", "unsloth")


def run(found: Findings) -> None:
    probe, dtype = (64 if found.toy else PROBE), str(found.dtype).removeprefix("torch.")
    peak = rate(found.device, probe=probe, dtype=found.dtype)
    found.add("product_flops", peak)
    tokens, steps, skip = ((64,), 3, 1) if found.toy else (TOKENS, STEPS, SKIPPED)
    if not found.toy:
        torch.cuda.empty_cache()  # the GPU is for the processes that follow
    for model, base in CASES[1:2] + CASES[2:3] if found.toy else CASES:
        asked: dict[str, Any] = {
            "shape": shape_of(model, toy=found.toy), "base": base, "tokens": tokens, "steps": steps, "skip": skip,
            "dtype": dtype, "device": str(found.device), "rate": peak,
        }  # fmt: skip
        for each in tokens:
            found.attempt(f"planned, {model}, {base}, {each}", lambda m=model, b=base, e=each: _planned(found, m, b, e))
        for program in (OURS, *PEERS):
            if found.left < LEAST:
                found.add(f"{program}, {model}, {base}", {"not_run": "no time was left"})
                continue
            found.add(f"{program}, {model}, {base}", _one(found, {**asked, "program": program}))
    for program in FOREIGN:
        found.attempt(program, lambda program=program: _foreign(found, program))


def _planned(found: Findings, model: str, base: str, tokens: int) -> dict[str, int]:
    """The planned peak of a training step, and of the whole run, as `lorakeet plan` has them."""
    config = settings_of(tokens, 2, len(SPREAD), **{
        "model.path": MODELS[model], "model.device": str(found.device), "model.dtype": "bfloat16",
        "model.quantize.method": base,
    })  # fmt: skip
    if found.toy:  # the shape of the rehearsal has no published name
        folder = str(write_model(shape_of(model, toy=True), found.folder / "small", "cpu"))
        config = config.changed(model={"path": folder, "dtype": "float32"})
    result = plan(config, PlanOptions(tokens=tokens), console=Console(quiet=True))
    return {"train step": result.planned.forecast.phase("train step").bytes, "run": result.peak}


def _one(found: Findings, asked: dict[str, Any]) -> dict[str, Any]:
    """What one program measured, in a process of its own."""
    question, answer = found.folder / "asked.json", found.folder / "answer.json"
    question.write_text(json.dumps(asked), encoding="utf-8")
    answer.unlink(missing_ok=True)
    log = found.folder / "contender.log"
    log.unlink(missing_ok=True)
    how = wait(Started("first_hour.contender", [str(question), str(answer)], log), min(MOST, found.left - 2))
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    print(said)
    value: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8")) if answer.exists() else {}
    if how != "done":
        value["failed"] = " ".join([how, *said.strip().splitlines()[-1:]])[:600]
    return value


def _foreign(found: Findings, program: str) -> Any:
    """TRL, and unsloth, by benchmarks/gpu_training.py, which has them load a folder as their documentation does."""
    if find_spec(program) is None:
        return {"not_run": f"{program} is not installed"}
    if found.toy or found.left < 2 * LEAST:
        return {"not_run": "no time was left"}
    results, log = found.folder / program, found.folder / f"{program}.log"
    names = {"trl": "lorakeet,trl,trl-keeping", "unsloth": "lorakeet,unsloth"}
    command = ["--models", "1B", "--bases", "none", "--tokens", "4096", "--rounds", "1", "--steps", "12", "--skip", "4"]
    command += ["--contenders", names[program], "--unsloth-python", sys.executable, "--results", str(results)]
    how = wait(Started("gpu_training", [*command, "--scratch", str(found.folder)], log), found.left - 2)
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    print(said)
    written = sorted(results.glob("*.json"))
    if not written:
        return {"failed": " ".join([how, *said.strip().splitlines()[-1:]])[:600]}
    cases = json.loads(written[-1].read_text(encoding="utf-8"))["cases"]
    return {name: {key: row[key] for key in ("tokens_per_second", "peak_bytes", "share_of_rate")}
            for case in cases for name, row in case["contenders"].items()}  # fmt: skip
