"""What a run's report says besides the measurements."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakeet
from lorakeet.kinds.report import PhaseTimes, curves, leaks, machine, memory_use, versions
from lorakeet.kinds.text.assemble import assemble_text
from lorakeet.memory.budget import Budget
from lorakeet.memory.cuda import CONTEXT
from lorakeet.train.log import read_metrics
from tiny.runs import quiet, settings


def test_the_curves_are_those_of_the_metrics(finished: Any) -> None:
    metrics = read_metrics(finished.path / "metrics.jsonl")
    found = curves(metrics, finished.result.outcome)
    assert [(point.step, point.value) for point in found.train] == [(r["step"], r["loss"]) for r in metrics if "loss" in r]
    assert found.held_out[0].step == 0 and found.held_out[0].value == finished.result.outcome.base_loss
    assert all(point.low is None and point.high is None for point in found.held_out)  # of 6 rows
    assert found.best_step == finished.result.outcome.best_step and found.ended == "all steps done"


def test_a_loss_that_was_no_number_leaves_a_gap(finished: Any) -> None:
    metrics = [{"step": 1, "loss": None, "lr": 0.1}, {"step": 2, "loss": 1.5, "lr": 0.1}]
    assert [point.step for point in curves(metrics, finished.result.outcome).train] == [2]


def test_every_leak_is_named_with_its_fate(finished: Any, tmp_path: Path) -> None:
    (leak,) = leaks(finished.result.setup.dataset.leaks)
    assert leak.held_out == "judged.jsonl:13" and leak.train == "rows.jsonl:1" and leak.action == "dropped from training"
    assert leak.similarity == 1 and leak.text.endswith("GOOD") and (leak.kind, leak.twin_text) == ("exact copy", leak.text)
    config = settings(finished.model, finished.data, tmp_path / "run", {"data.test": finished.test, "data.on_leak": "keep"})
    (kept,) = leaks(assemble_text(config, quiet()).dataset.leaks)
    assert kept.action == "kept"


def test_on_a_cuda_device_the_memory_is_that_devices_and_what_was_not_planned_is_beside_it(
    finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakeet.kinds.report.gpu_peak_bytes", lambda _: 900)
    monkeypatch.setattr("lorakeet.kinds.report.bytes_beside_torch", lambda _: 77)
    kept = replace(finished.result.setup.residency, budget=Budget(1000, "1000"), gpu=torch.device("cuda", 0))
    found = memory_use(replace(finished.result.setup, residency=kept), replace(finished.result.outcome, peak_bytes=800))
    assert [use.used for use in found[:4]] == [800, 900, 900, 77] and found[2].planned == 1000 and found[3].planned == CONTEXT
    assert found[1].what == "training, evaluation and certificate", "training resets the GPU's own peak"
    assert found[2].what == "training and evaluation, against memory.budget"
    assert found[0].what == "training, on cuda:0" and found[4].planned is None and (found[4].used or 0) > 1 << 20


def test_each_phase_has_its_time_and_its_share_of_the_run() -> None:
    assert PhaseTimes(training=96.0, evaluation=76.0, certificate=0.5).texts() == {
        "training": "2 min, 56 % of the run",
        "evaluation": "76 s, 44 % of the run",
        "certificate": "0.5 s, 0 % of the run",
    }


def test_the_report_says_how_long_each_phase_took(finished: Any) -> None:
    speed = finished.result.report.speed
    shares = [re.search(r" s, (\d+) % of the run", speed[f"{phase} time"]) for phase in ("Training", "Evaluation", "Certificate")]
    assert 99 <= sum(int(share[1]) for share in shares if share) <= 101
    assert speed["Training time"].endswith("held-out evaluations included")


def test_versions_name_the_packages_that_decide_numbers() -> None:
    found = versions()
    assert f"lorakeet {lorakeet.__version__}" in found and f"torch {torch.__version__.partition('+')[0]}" in found
    assert "transformers " in found and "Python 3." in found


def test_the_machine_is_named_with_its_threads() -> None:
    found = machine(torch.device("cpu"))
    assert f"{torch.get_num_threads()} of " in found and " threads" in found and not found.startswith(",")
