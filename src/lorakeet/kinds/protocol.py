"""A kind of run: what each one answers, so that one `finetune` and one `plan` serve all.

A new kind is one folder beside text/ and images/, with its line in registry.OWN, or a package of its own: a `DECLARATION`
(registry.KindDeclaration), and a subclass of `RunKind` whose instance is named KIND. A kind that is much like another
(preferences, over text) subclasses that one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from rich.console import Console

from lorakeet.config import RunConfig, read_run
from lorakeet.core.plan import Plan
from lorakeet.data.batches import StepOrder
from lorakeet.errors import ConfigError, EnvironmentProblem, spelt
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.report.rank_values import RankMap
from lorakeet.evaluate.report.report import Command, Report
from lorakeet.evaluate.values import encode
from lorakeet.kinds.trained_targets import Moved, target_rows
from lorakeet.memory.budget import Budget
from lorakeet.memory.measure import PeakMemory
from lorakeet.runs.open_adapter import require_text_run
from lorakeet.runs.residency import Residency
from lorakeet.train.processes import ALONE, Processes
from lorakeet.train.progress import TEXT, Words
from lorakeet.train.run import RunFolder
from lorakeet.train.task import Task

NO_BOUND = Budget()
Digests = Mapping[str, str]  # SHA-256 of each frozen tensor, by its path in the model


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """What a run works with, checked before anything is written. `config` holds what "auto" became on this machine."""

    config: RunConfig
    plan: Plan  # of the pairs that are trained
    dataset: Any  # its `train`, `held_out` and `test` are the rows of each part
    residency: Residency[Any] = field(default_factory=Residency)  # how memory.budget is kept
    processes: Processes = ALONE  # that train together
    memory: PeakMemory | None = None  # of the process, from before the model was loaded
    remarks: tuple[str, ...] = ()  # on what is trained, before it is
    moved: Moved | None = None  # once it is trained: which tensors left their start
    initial_plan: Plan | None = None  # once ranks were pruned: the plan with which training started

    @property
    def name(self) -> str:
        """The name of the base model."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        raise NotImplementedError

    @property
    def base_folder(self) -> Path | None:
        """The folder of the base model, where there is one."""
        return None

    @property
    def evaluated(self) -> tuple[str, Sequence[Any]]:
        """The name and the rows of the part that the report is about: the test rows, or else the held-out ones."""
        return ("test", self.dataset.test) if self.dataset.test else ("held-out", self.dataset.held_out)

    @property
    def trained_rows(self) -> int:
        """The rows that are trained on."""
        return len(self.dataset.train)

    @property
    def steps(self) -> int:
        """The steps of the run."""
        order = StepOrder(self.trained_rows, self.config.train.batch_size, self.config.train.seed)
        return self.config.train.total_steps(order.steps_per_epoch)

    @property
    def sharded(self) -> bool:
        """True if each process holds only a part of every frozen block."""
        return self.config.train.shard and self.processes.count > 1


AssemblyT = TypeVar("AssemblyT", bound=Assembly)


@dataclass(frozen=True)
class Advice:
    """A change of the settings, and the peak of the run with it: with weights in memory, or streamed."""

    settings: Mapping[str, str]  # by their paths
    peak: int
    streamed: bool = False

    @property
    def change(self) -> str:
        """The settings in words."""
        return " ".join(spelt(name, value) for name, value in self.settings.items())


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """The forecast of a run with its weights in memory; `advice` if it does not fit the budget, or what is free.

    `refused`: why `lorakeet finetune` would not start the run; the command then ends with exit code 2.
    """

    config: RunConfig
    device: torch.device
    planned: Any  # a MemoryPlan with the plan of the pairs and the work of a micro-batch
    advice: tuple[Advice, ...] = ()
    free: Budget = NO_BOUND  # on the machine that it is planned for, where one was named
    refused: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return 2 if self.refused else 0

    @property
    def later_commands(self) -> tuple[str, ...]:
        """Phases of the forecast that are commands of their own, and not in the peak of the run."""
        return ()

    @property
    def budget(self) -> Budget:
        return self.config.memory.limit

    @property
    def bound(self) -> Budget:
        """What the run may use: the budget, or else what is free on the machine that was named."""
        return self.budget or self.free

    @property
    def peak(self) -> int:
        """The most bytes of the run."""
        return int(self.planned.peak)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "model": self.config.model.path,
            "device": str(self.device),
            "trained_parameters": self.planned.plan.parameters,
            "targets": encode(target_rows(self.planned.plan)),
            "phases": [phase.to_mapping() for phase in self.planned.forecast.phases],
            "peak": self.peak,
            "budget": self.budget.limit,
            "fits": self.peak <= self.budget.bytes if self.budget else None,
            "refused": list(self.refused),
            "speed": asdict(self.planned.work),
            **({"machine": {"name": self.free.free, "bytes": self.free.bytes}} if self.free else {}),
        }


class RunKind(ABC, Generic[AssemblyT]):
    """One kind of run. `lorakeet plan` calls `plan`; `finetune` calls the other methods in the order in which they stand here."""

    words: ClassVar[Words] = TEXT  # what is computed and evaluated, in the plural
    several_processes: ClassVar[bool] = False  # can be started by torchrun
    peft_adapter: ClassVar[bool] = False  # its adapter is in PEFT's format, and gets a README
    tries_rates: ClassVar[bool] = False  # a run without a learning rate tries three first
    hub_task: ClassVar[str] = ""  # what a model hub calls the task

    def plan(
        self, config: RunConfig, console: Console, free: Budget = NO_BOUND, watch: Callable[[PlanResult], None] | None = None
    ) -> PlanResult:
        """Forecasts a run from the model's configuration, and prints the forecast. Raises ConfigError if that is not possible.

        `free` is what a run without a budget may use, of a machine that was named. `watch` gets the forecast with all weights in
        memory before other ways are searched.
        """
        raise ConfigError(f"kind is {config.kind}, whose memory cannot be planned. Train it without a budget.")

    def without_rows(self, config: RunConfig) -> RunConfig:
        """The same run, planned for rows of a given length instead of those of data.train."""
        return config

    def planned_pairs(self, config: RunConfig, say: Callable[[str], None]) -> tuple[Plan, bool]:
        """The pairs that the run will train, by the model's shapes alone, and whether its head shares the embedding's weight.

        Raises ConfigError where settings do not fit the model, or its configuration cannot be had.
        """
        raise ConfigError(f"{what_trains(config)}, whose pairs cannot be planned before it is trained.")

    def check(self, config: RunConfig, processes: int) -> None:
        """Raises ConfigError or EnvironmentProblem for settings that cannot be used; called before anything is loaded."""

    @abstractmethod
    def assemble(
        self, config: RunConfig, console: Console, *, processes: Processes, resumed: RunFolder | None, dry_run: bool
    ) -> AssemblyT:
        """Reads the rows, loads the model and makes the plan. Raises ConfigError and DataError; writes no run folder."""

    def summary(self, setup: AssemblyT, *, dry_run: bool) -> dict[str, Any]:
        """Keys of --json that only this kind has."""
        return {}

    def show(self, setup: AssemblyT, console: Console, *, dry_run: bool) -> None:
        """Prints the rows and the plan before training."""
        console.print(setup.plan.summary(), markup=False, soft_wrap=True)

    @abstractmethod
    def task(self, setup: AssemblyT, run: RunFolder, console: Console) -> Task[Any]:
        """The task that `train` runs; adds the pairs of the plan to the model. Raises ConfigError; writes nothing."""

    def split_record(self, setup: AssemblyT) -> dict[str, object]:
        """Which rows are in which part, as split.json records it; a resumed run must have the same."""
        return dict(setup.dataset.split_record())

    def frozen_digests(self, setup: AssemblyT) -> Digests:
        """The digest of each frozen tensor in memory."""
        return {}

    @abstractmethod
    def identity(self, setup: AssemblyT, digests: Digests) -> dict[str, str | list[str]]:
        """Hashes of what must be the same when a run is resumed, besides the training settings."""

    def training(self, setup: AssemblyT, task: Any, run: RunFolder, console: Console) -> AbstractContextManager[None]:
        """A context around training."""
        return nullcontext()

    def trained(self, setup: AssemblyT, task: Any) -> AssemblyT:
        """The assembly after training, with the trained model, and the plan that pruning left."""
        return setup

    @abstractmethod
    def evaluate(self, setup: AssemblyT, run: RunFolder, console: Console) -> Report:
        """The measured sections of the report, with its leaks and warnings: base and adapter on the evaluated rows."""

    @abstractmethod
    def certify(self, setup: AssemblyT, run: RunFolder, before: Digests) -> Certificate:
        """Compares RUN/adapter, read again, with the trained one, and the frozen tensors with those `before` training."""

    def evaluator(self, run: RunFolder | None) -> Callable[..., Any]:
        """What measures a text model on rows, with what `run` keeps of its training. Raises ConfigError without a text model."""
        raise ConfigError("This kind of run has no text model, so no rows of text are measured with it.")

    def evaluate_run(self, run: RunFolder, config: RunConfig, data: str | None, console: Console) -> Report:
        """Evaluates a finished run without a text model again, on the rows of `data` or else on its own.

        Raises ConfigError for a kind that is evaluated in its run only.
        """
        raise ConfigError(f"{run.path} is a run of kind {config.kind}, which is evaluated in its run only.")

    def verify_run(self, run: RunFolder, config: RunConfig, against: Sequence[str], console: Console) -> Certificate:
        """Compares a finished run without a text model with its artefacts `against`; without any, with its own adapter.

        Checks of an artefact are called "ARTEFACT: what is compared", by its path from the folder around the run.
        Raises ConfigError for a kind that is verified in its run only.
        """
        raise ConfigError(f"{run.path} is a run of kind {config.kind}, which is verified in its run only.")

    @abstractmethod
    def model_text(self, setup: AssemblyT) -> str:
        """The base model and its precision, for the report."""

    def facts(self, setup: AssemblyT) -> dict[str, str]:
        """What the report says of the rows and of how they were evaluated."""
        data = setup.dataset
        counts = f"{len(data.train)} training, {len(data.held_out)} held-out, {len(data.test)} test"
        return {self.words.evaluated.capitalize(): counts}

    def rank_map(self, setup: AssemblyT, metrics: Sequence[dict[str, Any]]) -> RankMap | None:
        """The ranks by block and matrix, where the report shows them."""
        return None

    def usage(self, *, loads: bool) -> tuple[str, ...]:
        """Lines of the adapter's README.md that use it; `loads`: its base is named by what other programs load too."""
        return ()

    def next_commands(self, setup: AssemblyT, run: RunFolder) -> tuple[Command, ...]:
        """Commands that the report recommends."""
        return ()


def what_trains(config: RunConfig) -> str:
    """What decides the kind of a run, in words."""
    return str(config.train.registered) if config.declaration.over else f"kind is {config.kind}"


def run_kind(config: RunConfig) -> RunKind[Any]:
    """The kind of this run; only its own modules are imported."""
    module = config.declaration.module
    try:
        return cast("RunKind[Any]", import_module(module).KIND)
    except (ImportError, AttributeError) as error:
        if module.startswith("lorakeet."):
            raise
        raise EnvironmentProblem(
            f"Runs of kind {config.declaration.name} cannot be carried out: {module} fails with {type(error).__name__}: {error}. "
            "Install what it needs, or another version of its package."
        ) from error


def run_without_text(path: Path) -> tuple[RunKind[Any], RunFolder, RunConfig] | None:
    """The kind, the folder and the settings of a run whose kind has no text model; None for all else.

    Raises ConfigError for a kind that says what to do instead (registry.KindDeclaration).
    """
    run = RunFolder.at(path)
    config = None if run is None else read_run(run.config)
    if run is None or config is None or config.declaration.text_model:
        return None
    if config.declaration.instead:
        require_text_run(path, config)
    return run_kind(config), run, config
