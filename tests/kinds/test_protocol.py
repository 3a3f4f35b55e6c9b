"""A new kind of run is one file: a linear regression on numbers, trained, evaluated, certified, reported and resumed."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lorakeet.config import KINDS, RunConfig, read_run
from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.data.batches import StepOrder
from lorakeet.data.prepare import load_dataset
from lorakeet.errors import ConfigError, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, read_certificate, tolerance_check
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.report.compose import language_report
from lorakeet.evaluate.report.report import Report, read_report
from lorakeet.kinds.protocol import Assembly, RunKind
from lorakeet.runs.run_folder import hashes_of_parts
from lorakeet.train.processes import ALONE
from lorakeet.train.task import NONE_KEPT, HeldOut, Size, gradients_by_batch
from lorakeet.verbs.finetune import FinetuneResult, finetune
from lorakeet.verbs.options import FinetuneOptions
from lorakeet.verbs.plan import plan
from tiny.runs import quiet, tree, write_rows


@dataclass(frozen=True, kw_only=True)
class LineAssembly(Assembly):
    weights: Tensor
    name, device = "line", torch.device("cpu")


class LineTask:
    processes, pruning, kept_terms, dtype, learning_rate = ALONE, None, NONE_KEPT, torch.float32, 0.3

    def __init__(self, setup: LineAssembly) -> None:
        self.rows, self.held_out_rows = numbers(setup.dataset.train), numbers(setup.dataset.held_out)
        self.order = StepOrder(len(self.rows), setup.config.train.batch_size, setup.config.train.seed)
        self.weights, self.steps_per_epoch = Parameter(setup.weights.clone()), self.order.steps_per_epoch
        self.parameters, self.fixed = lambda: {"line.A": self.weights}, dict

    def batches(self, step: int) -> list[Tensor]:
        return [self.rows[list(self.order.indices(step))]]

    def size(self, batch: Tensor) -> Size:
        return Size(len(batch), len(batch), len(batch))

    def gradients(self, batches: Any, targets: float) -> Tensor:
        return gradients_by_batch(lambda batch: errors(batch, self.weights).sum(), batches, targets)

    def held_out(self) -> HeldOut:
        return HeldOut(errors(self.held_out_rows, self.weights).detach().double().numpy(), np.ones(len(self.held_out_rows)))

    def save(self, folder: Path) -> None:
        np.savetxt(folder / "line.txt", self.weights.detach().numpy())


class LineKind(RunKind[LineAssembly]):
    def assemble(self, config: RunConfig, console: Any, **_: Any) -> LineAssembly:
        pairs, data = Plan((PlanEntry("line", "linear", (1, 2), 1, 1.0),)), load_dataset(config.data)
        return LineAssembly(config=config, plan=pairs, dataset=data, weights=torch.zeros(1, 2))

    def task(self, setup: LineAssembly, run: Any, console: Any) -> LineTask:
        return LineTask(setup)

    def identity(self, setup: LineAssembly, digests: Any) -> dict[str, Any]:
        return hashes_of_parts({"numbers": numbers(setup.dataset.train).tolist()})

    def trained(self, setup: LineAssembly, task: LineTask) -> LineAssembly:
        return replace(setup, weights=task.weights.detach())

    def evaluate(self, setup: LineAssembly, run: Any, console: Any) -> Report:
        rows = setup.dataset.held_out
        texts, ones = [row.text for row in rows], np.ones(len(rows), np.int64)
        adapter, base = (errors(numbers(rows), each).double().numpy() for each in (setup.weights, 0 * setup.weights))
        sides = {"adapter": RowLosses("adapter", adapter, ones), "base": RowLosses("base", base, ones)}
        return language_report("Fitting a line", **sides, texts=texts, truths=texts, spec=setup.config.evaluate)

    def certify(self, setup: LineAssembly, run: Any, before: Any) -> Certificate:
        measured = {"weight": float(np.abs(np.loadtxt(run.adapter / "line.txt") - setup.weights.numpy()).max())}
        return Certificate("A line", (tolerance_check("on disk", measured, tolerance={"weight": 1e-6}, between=("a", "b")),))

    def model_text(self, setup: LineAssembly) -> str:
        return "two weights, zero at first"


KIND = LineKind()


def numbers(rows: Any) -> Tensor:
    return torch.tensor([[float(word) for word in row.text.split()] for row in rows])


def errors(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows[:, :2] @ weights.T - rows[:, 2:]).square().sum(1)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Forty points of z = 3x - 2y with a little noise."""
    monkeypatch.setitem(KINDS, "line", __name__)
    draw = random.Random(0)
    points = [(draw.random(), draw.random(), draw.gauss(0, 0.01)) for _ in range(40)]
    data = write_rows(tmp_path / "points.jsonl", [{"text": f"{x} {y} {3 * x - 2 * y + noise}"} for x, y, noise in points])
    flags = {
        "kind": "line", "model": "none", "data.train": data, "data.held_out_fraction": 0.25, "data.near_duplicates": 1,
        "train.steps": 60, "train.batch_size": 10, "train.checkpoint_every": 20, "train.patience": 0, "out": tmp_path / "run",
    }  # fmt: skip
    return read_run(None, {key: str(value) for key, value in flags.items()})


def trained(config: RunConfig, **options: Any) -> FinetuneResult:
    return finetune(config, FinetuneOptions(**options), console=quiet())


def test_a_run_kind_sixty_lines_is_trained_evaluated_certified_and_reported(config: RunConfig, tmp_path: Path) -> None:
    result = trained(config)
    assert result.setup.weights.tolist()[0] == pytest.approx([3, -2], abs=0.5)
    report = read_report(result.run.report)
    assert report == result.report and report.comparisons[0].verdict == "better" and report.rows_of == 10
    assert report.facts["Model"] == "two weights, zero at first" and report.facts["Rows"].startswith("30 training")
    assert "two weights" in result.run.page.read_text() and read_certificate(result.run.certificate).passed
    mapping = result.to_mapping()
    assert mapping["rows"] == {"train": 30, "held_out": 10, "test": 0} and mapping["steps"] == mapping["outcome"]["steps"] == 60


def test_it_is_resumed_to_the_same_bytes(config: RunConfig, tmp_path: Path) -> None:
    first, copy = trained(config).run.path, tmp_path / "copy"
    shutil.copytree(first, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000060")
    shutil.rmtree(copy / "adapter")
    again = trained(read_run(copy / "config.yaml"), resume=copy)
    assert again.outcome is not None and again.outcome.steps == 60
    assert tree(copy / "adapter") == tree(first / "adapter")


def test_a_dry_run_writes_nothing_and_a_failed_check_is_raised(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="kind is line, whose memory cannot be planned"):
        plan(config, console=quiet())
    assert trained(config, dry_run=True).to_mapping()["dry_run"] and not (tmp_path / "run").exists()
    monkeypatch.setattr(LineTask, "save", lambda self, folder: np.savetxt(folder / "line.txt", np.zeros((1, 2))))
    with pytest.raises(VerificationFailed, match="on disk"):
        trained(config)


def test_the_names_of_kinds_are_those_of_the_registry(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"kind \(flag --kind\) is 'lime'.*expected one of 'text', 'image', 'line'.*'line'\?"):
        read_run(None, {"kind": "lime", "data.train": "x", "model": "y"})
    with pytest.raises(ConfigError, match=r"kind is line, and no learning rates are tried for that"):
        trained(config, quick=True)
    monkeypatch.delitem(KINDS, "line")
    with pytest.raises(ConfigError, match="expected one of 'text', 'image'"):
        read_run(None, {"kind": "line", "data.train": "x", "model": "y"})


def test_a_run_imports_the_modules_of_its_own_kind_only() -> None:
    code = (
        "import sys, lorakeet.verbs.finetune\nfrom lorakeet.config import RunConfig\n"
        "from lorakeet.kinds.protocol import run_kind\n"
        "run_kind(RunConfig())\n"
        "print([name for name in sys.modules if name == 'diffusers' or name.startswith('lorakeet.kinds.images.kind')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
