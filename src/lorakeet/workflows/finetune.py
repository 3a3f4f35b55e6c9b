"""`lorakeet finetune`: trains an adapter and proves it against its base on rows that it never saw.

assemble (rows, model, plan, ids) → choose the rate → inject → train → judge (base, adapter, floors) → certify → report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError, Problems
from lorakeet.evaluate.report.rank_values import Search
from lorakeet.evaluate.report.report import Report
from lorakeet.evaluate.values import encode
from lorakeet.memory.allocator import give_back_free_memory
from lorakeet.memory.cuda import promised
from lorakeet.memory.measure import PeakMemory
from lorakeet.models.files.fingerprint import fingerprint
from lorakeet.models.text.digests import frozen_digests
from lorakeet.models.text.hidden_states import frozen_depth, prefix_states
from lorakeet.models.text.shard import part_blocks
from lorakeet.train.launch import launched
from lorakeet.train.log import read_metrics, require_sink
from lorakeet.train.loop import Outcome, train
from lorakeet.train.processes import joined
from lorakeet.train.progress import reporter_for
from lorakeet.train.run import RunFolder
from lorakeet.train.text.task import TextTask
from lorakeet.workflows.finetuning import report as page
from lorakeet.workflows.finetuning.assemble_text import Assembly, assemble, ready_to_train
from lorakeet.workflows.finetuning.certify_text import certify_run
from lorakeet.workflows.finetuning.cuda_graphs import record_passes, require_recordable
from lorakeet.workflows.finetuning.evaluate_text import Judge
from lorakeet.workflows.finetuning.finish import conclude, judging
from lorakeet.workflows.finetuning.terminal import show_run_plan
from lorakeet.workflows.finetuning.train_image import ImageResult, finetune_images
from lorakeet.workflows.runs.multi_process import begun_together, judged_together, require_combinable
from lorakeet.workflows.runs.output_paths import require_place
from lorakeet.workflows.runs.peak_memory import say_peak
from lorakeet.workflows.runs.pruning import pruned_plan
from lorakeet.workflows.runs.run_folder import begin_run, hashes_of_parts, rates_of
from lorakeet.workflows.tuning.learning_rate import FEWEST_STEPS, choose_rate


@dataclass(frozen=True)
class FinetuneResult:
    """What a run gave; a dry run has no outcome."""

    setup: Assembly
    run: RunFolder
    outcome: Outcome | None = None
    report: Report | None = None

    @property
    def exit_code(self) -> int:
        return 0

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        found: dict[str, Any] = {
            "run": str(self.run.path),
            "trained_parameters": self.setup.plan.parameters,
            "pairs": len(self.setup.plan.entries),
            "steps": self.setup.steps,
            "tokens_per_epoch": self.setup.tokens_per_epoch,
            "rows": {
                "train": len(self.setup.dataset.train),
                "held_out": len(self.setup.dataset.held_out),
                "test": len(self.setup.dataset.test),
            },
        }
        if self.setup.residency.plan is not None:
            found["memory"] = self.setup.residency.plan.to_mapping()
        if cuts := self.setup.cuts:
            found["cuts"] = {str(step): budget for step, budget in cuts.items()}
        if self.outcome is None or self.report is None:
            ranks = dict(self.setup.config.lora.rank_pattern)
            return {**found, "dry_run": True, "plan": self.setup.plan.to_mapping(), "rank_pattern": ranks}
        return {**found, "outcome": encode(self.outcome), "report": encode(self.report)}


def finetune(
    config: RunConfig,
    *,
    resume: Path | None = None,
    dry_run: bool = False,
    budget: str | None = None,
    quick: bool = False,
    console: Console,
) -> FinetuneResult | ImageResult:
    """Trains, judges and certifies; everything is in the run folder `config.out`, or in `resume`.

    A run whose settings name no learning rate, or one that is asked to by `quick`, tries three first
    (workflows/tuning/learning_rate).
    Started by torchrun, all its processes train it together, and the first one does everything else (train/processes).
    Raises ConfigError, DataError and EnvironmentProblem before anything is written, RunStopped when the run ends early, and
    VerificationFailed when the certificate fails (the run folder then holds it).
    """
    config = _with_budget(config, budget)
    launch = launched()
    run = RunFolder(resume or Path(config.out), launch.command)
    with joined(launch) as processes, begun_together(run):
        require_combinable(config, launch)
        require_recordable(config, launch.count)
        if not dry_run:
            processes.from_first(lambda: _require_run(run, resume=resume is not None))
        require_sink(config.train.log_to)
        _check_quick(config, quick, resume)
        with promised(config.memory.limit, "Raise the budget."), PeakMemory() as memory:
            if config.kind == "image":
                return finetune_images(config, run, resume=resume is not None, dry_run=dry_run, console=console)
            setup = dataclasses.replace(assemble(config, console, processes), memory=memory)
            show_run_plan(setup, console)
            if dry_run:
                return FinetuneResult(setup, run)
            return _trained(setup, run, resume=resume is not None, quick=quick, console=console)


def _trained(setup: Assembly, run: RunFolder, *, resume: bool, quick: bool, console: Console) -> FinetuneResult:
    """Trained by all processes; judged and certified by the first one, or by all where each has a part of the base only."""
    processes = setup.processes
    setup, rates = (setup, rates_of(run)) if resume else choose_rate(setup, console, asked=quick)
    setup = _with_rate(setup, processes.from_first(lambda: setup.config.train.learning_rate))
    task = ready_to_train(setup)
    if setup.config.train.keep_prefix_states:
        frozen_depth(setup.text)  # refused before anything is written
    record_passes(setup.text, task, console)
    record = setup.dataset.split_record()
    processes.from_first(lambda: begin_run(run, setup.config, record, resume=resume, rates=rates))
    before = {} if setup.residency.store else frozen_digests(setup.text.model)  # streamed weights are only read
    if setup.parted:
        with processes.gathering():
            part_blocks(setup.text, processes.count, torch.device(setup.config.model.device))
    elif setup.config.train.shard:
        console.print("train.shard parts the base over several processes. This is one, which holds it whole.", soft_wrap=True)
    try:
        with _kept_states(setup, task, run, console):
            outcome = train(
                task,
                setup.config.train,
                run=run,
                identity=_identity(setup),
                resume=resume,
                report=reporter_for(console),
                budget=setup.residency.budget.limit,
            )
    finally:
        task.replayed = None  # what recorded passes hold of a card is free, for the certificate's second model too
    if task.pruning is not None:
        setup = dataclasses.replace(setup, plan=pruned_plan(setup.text, setup.plan), begun=setup.plan)
    with judging(run), judged_together(processes, run, outcome):
        if not setup.parted:
            processes.disband()
            if not processes.first:
                return FinetuneResult(setup, run, outcome)
        give_back_free_memory()  # what training's heap grew to is not held beside the two models of the certificate
        return FinetuneResult(setup, run, outcome, _prove(setup, outcome, run, before, rates, console))


def _with_rate(setup: Assembly, rate: float | None) -> Assembly:
    """The assembly with that learning rate, so that every process trains with the one that the first has chosen."""
    train = dataclasses.replace(setup.config.train, learning_rate=rate)
    return dataclasses.replace(setup, config=dataclasses.replace(setup.config, train=train))


@contextmanager
def _kept_states(setup: Assembly, task: TextTask, run: RunFolder, console: Console) -> Iterator[None]:
    """A context in which held-out rows, and training rows of several epochs, pass the lowest, untrained blocks once."""
    spec = setup.config.train
    if not spec.keep_prefix_states:
        yield
        return
    several = spec.total_steps(task.steps_per_epoch) >= 2 * task.steps_per_epoch
    rows = (*task.held_out_rows, *(task.train if several else ()))
    say = partial(console.print, markup=False, soft_wrap=True)
    with prefix_states(setup.text, rows, folder=run.path, micro_tokens=spec.micro_tokens, say=say):
        yield


def _with_budget(config: RunConfig, budget: str | None) -> RunConfig:
    """The settings with ranks.budget as --budget says; a resumed run has its ranks already."""
    if budget is None:
        return config
    ranks = dataclasses.replace(config.ranks, budget=budget)
    if problems := ranks.validate():
        raise ConfigError("; ".join(problems))
    return dataclasses.replace(config, ranks=ranks)


def _check_quick(config: RunConfig, quick: bool, resume: Path | None) -> None:
    """Raises ConfigError where --quick cannot mean anything."""
    if not quick:
        return
    problems = Problems("--quick cannot be used")
    if resume is not None:
        problems.add(f"{resume} has its learning rate already, and a resumed run keeps it. Leave --quick out.")
    if config.kind == "image":
        problems.add("Learning rates are tried for text models only. Leave --quick out, and compare whole runs.")
    if config.train.rate_trial_steps < FEWEST_STEPS:
        steps = config.train.rate_trial_steps
        problems.add(f"train.rate_trial_steps is {steps}, which tries none. Give the number of steps to try, such as 12.")
    problems.raise_if_any()


def _require_run(run: RunFolder, *, resume: bool) -> None:
    """Opens a run to go on with it, or makes sure that a new one can be written."""
    if resume:
        RunFolder.open(run.path)
        return
    run.require_free()
    require_place(run.path)


def _identity(setup: Assembly) -> dict[str, str | list[str]]:
    """What must be equal for a run to be resumed, besides the training settings."""
    config = setup.config
    examples = (*setup.train.examples, *setup.held_out.examples)
    parts: dict[str, Any] = {
        "model settings": config.model.identity(),
        "lora settings": dataclasses.asdict(config.lora),
        "tokens of the rows": [[example.key, example.ids.tolist()] for example in examples],
    }
    if cuts := setup.cuts:  # all that a pruned run takes from the ranks settings
        parts["cuts of the ranks"] = cuts
    alone = config.model if setup.processes.count == 1 else None  # earlier versions refused several CUDA devices
    return {**hashes_of_parts(parts, alone), "files of the base model": fingerprint(setup.text.source)}


def _prove(
    setup: Assembly, outcome: Outcome, run: RunFolder, before: dict[str, str], rates: Search | None, console: Console
) -> Report | None:
    """Judges, certifies and reports, the last in the first process alone (else: None); VerificationFailed when a check fails."""
    part, rows = setup.judged
    judge = Judge(setup.config, setup.text, setup.encoder, rows, console)
    learnt_from = [*setup.dataset.train, *(setup.dataset.held_out if part == "test" else ())]
    measured = judge.report(f"Fine-tuning {setup.text.name}", learnt_from=learnt_from)
    drift = judge.drift()
    certificate = certify_run(
        setup.text,
        run.adapter,
        setup.held_out.examples,
        before=before,
        model=None if setup.parted or setup.residency.budget else setup.config.model,  # there is room for one base
        spec=setup.config.evaluate,
    )

    residency, memory = setup.residency, setup.memory
    if residency.budget and residency.gpu is None and memory is not None:
        memory.now()
        say_peak(memory, residency, console)
    setup.processes.disband()  # nothing is gathered from here on
    if not setup.processes.first:
        return None
    metrics = read_metrics(run.metrics)
    report = page.complete(measured, setup, outcome, run=run, metrics=metrics, certificate=certificate, drift=drift, rates=rates)
    conclude(report, certificate, run, console)
    return report
