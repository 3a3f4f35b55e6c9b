"""A kind of run as another package would bring it: a linear regression on numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from line_kind import DrawLineOptions, LineSpec
from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.data.batches import StepOrder
from lorakeet.data.prepare import load_dataset
from lorakeet.data.read import read_rows
from lorakeet.evaluate.certificate import Certificate, tolerance_check
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.report.compose import language_report
from lorakeet.evaluate.report.report import Report
from lorakeet.kinds.protocol import NO_BOUND, Assembly, PlanResult, RunKind
from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.memory.ledger import Work
from lorakeet.runs.residency import MemoryPlan
from lorakeet.runs.run_folder import hashes_of_parts
from lorakeet.train.processes import ALONE
from lorakeet.train.run import RunFolder
from lorakeet.train.task import NONE_KEPT, HeldOut, Size, gradients_by_batch

PAIRS = Plan((PlanEntry("line", "linear", (1, 2), 1, 1.0),))


@dataclass(frozen=True)
class LinePlan(MemoryPlan):
    plan: Plan = PAIRS
    work: Work = field(default_factory=Work)


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
    def plan(
        self, config: RunConfig, console: Any, free: Budget = NO_BOUND, watch: Callable[[PlanResult], None] | None = None
    ) -> PlanResult:
        console.print("Two weights, and their moments.")
        return PlanResult(config=config, device=torch.device("cpu"), planned=LinePlan(Forecast((Phase("train", {"base": 32}),))))

    def assemble(self, config: RunConfig, console: Any, **_: Any) -> LineAssembly:
        first = config.section(LineSpec).start if hasattr(config, "line") else 0.0
        return LineAssembly(config=config, plan=PAIRS, dataset=load_dataset(config.data), weights=torch.full((1, 2), first))

    def task(self, setup: LineAssembly, run: Any, console: Any) -> LineTask:
        return LineTask(setup)

    def identity(self, setup: LineAssembly, digests: Any) -> dict[str, Any]:
        return hashes_of_parts({"numbers": numbers(setup.dataset.train).tolist()})

    def trained(self, setup: LineAssembly, task: LineTask) -> LineAssembly:
        return replace(setup, weights=task.weights.detach())

    def evaluate(self, setup: LineAssembly, run: Any, console: Any) -> Report:
        return fitted(setup.weights, setup.dataset.held_out, setup.config)

    def evaluate_run(self, run: RunFolder, config: RunConfig, data: str | None, console: Any) -> Report:
        rows = read_rows(data, config.data) if data else load_dataset(config.data).held_out
        return fitted(read_weights(run.adapter), rows, config)

    def verify_run(self, run: RunFolder, config: RunConfig, against: Sequence[str], console: Any) -> Certificate:
        written = torch.tensor(np.loadtxt(against[0]), dtype=torch.float32)
        found = {"weight": float((written - read_weights(run.adapter)).abs().max())}
        checked = tolerance_check(f"{against[0]}: weights", found, tolerance={"weight": 1e-6}, between=("the run", "the file"))
        return Certificate("A line", (checked,))

    def certify(self, setup: LineAssembly, run: Any, before: Any) -> Certificate:
        measured = {"weight": float(np.abs(np.loadtxt(run.adapter / "line.txt") - setup.weights.numpy()).max())}
        return Certificate("A line", (tolerance_check("on disk", measured, tolerance={"weight": 1e-6}, between=("a", "b")),))

    def model_text(self, setup: LineAssembly) -> str:
        return "two weights, zero at first"


@dataclass(frozen=True)
class DrawnLine:
    weights: list[float]

    def to_mapping(self) -> dict[str, Any]:
        return {"weights": self.weights}


def draw_line(options: DrawLineOptions, *, console: Any) -> DrawnLine:
    return DrawnLine(read_weights(Path(options.run) / "adapter")[0].tolist())


def numbers(rows: Any) -> Tensor:
    return torch.tensor([[float(word) for word in row.text.split()] for row in rows])


def errors(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows[:, :2] @ weights.T - rows[:, 2:]).square().sum(1)


def read_weights(folder: Path) -> Tensor:
    return torch.tensor(np.loadtxt(folder / "line.txt"), dtype=torch.float32).view(1, 2)


def fitted(weights: Tensor, rows: Any, config: RunConfig) -> Report:
    texts, ones = [row.text for row in rows], np.ones(len(rows), np.int64)
    adapter, base = (errors(numbers(rows), each).double().numpy() for each in (weights, 0 * weights))
    sides = {"adapter": RowLosses("adapter", adapter, ones), "base": RowLosses("base", base, ones)}
    return language_report("Fitting a line", **sides, texts=texts, truths=texts, spec=config.evaluate)


KIND = LineKind()
