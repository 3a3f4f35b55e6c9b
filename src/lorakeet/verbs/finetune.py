"""`lorakeet finetune`: trains an adapter and evaluates it against its base on rows that it never saw.

assemble (rows, model, plan) → choose the rate → add pairs → train → evaluate (base, adapter) → certify → report.

What a kind of run does in each of these is in kinds/protocol.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError, Problems
from lorakeet.evaluate.report.rank_values import Search
from lorakeet.evaluate.report.report import Report, read_report, write_report
from lorakeet.evaluate.values import encode
from lorakeet.kinds.adapter_card import write_adapter_card
from lorakeet.kinds.protocol import Digests, RunKind, run_kind, what_trains
from lorakeet.kinds.report import PhaseTimes, complete
from lorakeet.kinds.terminal import show_certificate, show_results
from lorakeet.kinds.text.tuning.learning_rate import FEWEST_STEPS, choose_rate
from lorakeet.kinds.trained_targets import Moved, target_rows
from lorakeet.memory.allocator import release_free_memory
from lorakeet.memory.cuda import enforcing_gpu_budget
from lorakeet.memory.measure import PeakMemory
from lorakeet.runs.certified import identified
from lorakeet.runs.multi_process import evaluating_together, require_combinable, starting_together
from lorakeet.runs.output_paths import writing
from lorakeet.runs.residency import say_peak
from lorakeet.runs.run_folder import begin_run, evaluating, rates_of, stoppable
from lorakeet.train.launch import launched
from lorakeet.train.log import require_sink
from lorakeet.train.loop import Outcome, train
from lorakeet.train.movement import StartValues
from lorakeet.train.processes import joined
from lorakeet.train.progress import OnRecord, Reporter, reporter_for, with_calls
from lorakeet.train.run import RunFolder
from lorakeet.verbs.early.checks import require_new_run
from lorakeet.verbs.options import FinetuneOptions
from lorakeet.verbs.seeds import config_of_seed, require_repeatable, seeds_of, with_seeds, write_seeds


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a run; a dry run has no outcome."""

    exit_code: ClassVar[int] = 0
    setup: Any  # the Assembly of its kind
    run: RunFolder
    outcome: Outcome | None = None
    report: Report | None = None
    values: dict[str, Any] | None = None  # its plain values, where the model was freed for further seeds

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        if self.values is not None:
            return {**self.values, "report": encode(self.report)}
        dry_run = self.outcome is None or self.report is None
        kind, data = run_kind(self.setup.config), self.setup.dataset
        found = {
            "run": str(self.run.path),
            "trained_parameters": self.setup.plan.parameters,
            "pairs": len(self.setup.plan.entries),
            "steps": self.setup.steps,
            kind.words.evaluated: {"train": len(data.train), "held_out": len(data.held_out), "test": len(data.test)},
            **kind.summary(self.setup, dry_run=dry_run),
        }
        if dry_run:
            targets = encode(target_rows(self.setup.plan))
            return {**found, "dry_run": True, "plan": self.setup.plan.to_mapping(), "targets": targets}
        return {**found, "outcome": encode(self.outcome), "report": encode(self.report)}


def finetune(
    config: RunConfig,
    options: FinetuneOptions = FinetuneOptions(),
    *,
    console: Console,
    on_step: OnRecord | None = None,
    on_held_out: OnRecord | None = None,
) -> FinetuneResult:
    """Trains, evaluates and certifies; everything is in the run folder `config.out`, or in `options.resume`.

    With `options.seeds` further seeds are trained one after another, each in a folder of its own within the run.
    A run whose settings name no learning rate, or with `options.try_rates`, tries three first (kinds/text/tuning/learning_rate).
    If torchrun started several processes, all train together and the first one does everything else (train/processes).
    `on_step` and `on_held_out` are called with each record of a step and of a held-out evaluation, in the first process.
    Raises ConfigError, DataError and EnvironmentProblem before anything is written, RunStopped when the run ends early, and
    VerificationFailed when the certificate fails (the run folder then contains it).
    """
    require_repeatable(config, options, launched().count)
    if options.seeds > 1 and not options.dry_run:
        return _over_seeds(config, options, console, on_step, on_held_out)
    if options.budget is not None:  # a resumed run already has its ranks
        config = config.changed(ranks={"budget": options.budget})
        if problems := config.ranks.validate():
            raise ConfigError("; ".join(problems))
    kind, launch, resume = run_kind(config), launched(), options.resume is not None
    run = RunFolder(options.resume or Path(config.out), launch.command)
    with joined(launch) as processes, starting_together(run):
        require_combinable(config, launch, several=kind.several_processes)
        kind.check(config, launch.count)
        if not options.dry_run:
            processes.from_first(lambda: _require_run(run, resume=resume))
        require_sink(config.train.log_to)
        _check_try_rates(config, options, kind)
        with enforcing_gpu_budget(config.memory.limit, "Raise the budget."), PeakMemory() as memory:
            setup = kind.assemble(config, console, processes=processes, resumed=run if resume else None, dry_run=options.dry_run)
            setup = dataclasses.replace(setup, memory=memory)
            kind.show(setup, console, dry_run=options.dry_run)
            if options.dry_run:
                return FinetuneResult(setup, run)
            reporter = with_calls(reporter_for(console, words=kind.words), on_step, on_held_out)
            return _trained(kind, setup, run, options, console, reporter)


def _over_seeds(
    config: RunConfig, options: FinetuneOptions, console: Console, on_step: OnRecord | None, on_held_out: OnRecord | None
) -> FinetuneResult:
    """The run of the first seed, then the others with its learning rate; of those, finished ones are kept as they are."""
    alone = dataclasses.replace(options, seeds=1)
    found = finetune(config, alone, console=console, on_step=on_step, on_held_out=on_held_out)
    found = dataclasses.replace(found, values=found.to_mapping(), setup=None)  # the next model has its place
    run, before, others = found.run, found.report, dict[int, Report]()
    assert before is not None
    for seed, folder in list(seeds_of(config, run, options.seeds).items())[1:]:
        if not folder.report.is_file():
            release_free_memory()
            console.print(f"Seed {seed}, in {folder.path}:", soft_wrap=True)
            further = dataclasses.replace(alone, try_rates=False, resume=folder.path if folder.config.is_file() else None)
            finetune(config_of_seed(run, seed, folder.path), further, console=console, on_step=on_step, on_held_out=on_held_out)
        others[seed] = read_report(folder.report)
    report = with_seeds(before, others, config.evaluate.confidence, config.train.seed)
    with writing(f"The report in {run.path}", f"The adapters are whole. Free some space, then: {run.resume_command}"):
        write_seeds(report, before, run)
    if report.verdict is not None:
        console.print(report.verdict.sentence, style="bold", markup=False, highlight=False, soft_wrap=True)
    return dataclasses.replace(found, report=report)


def _trained(
    kind: RunKind[Any], setup: Any, run: RunFolder, options: FinetuneOptions, console: Console, report: Reporter
) -> FinetuneResult:
    """Trains in all processes; evaluates and certifies in the first one, or in all if each has only a shard of the base."""
    processes, resume, search = setup.processes, options.resume is not None, None
    if resume:
        search = rates_of(run)
    elif kind.tries_rates:
        setup, search = choose_rate(setup, console, requested=options.try_rates)
    rate = processes.from_first(lambda: setup.config.train.learning_rate)
    setup = dataclasses.replace(setup, config=setup.config.changed(train={"learning_rate": rate}))
    task = kind.task(setup, run, console)
    record, before, start = kind.split_record(setup), kind.frozen_digests(setup), StartValues.of(task.parameters())
    processes.from_first(lambda: begin_run(run, setup.config, record, resume=resume, rates=search))
    with stoppable(run), kind.training(setup, task, run, console):
        identity, budget = kind.identity(setup, before), setup.residency.budget.limit
        outcome = train(task, setup.config.train, run=run, identity=identity, resume=resume, report=report, budget=budget)
    setup = kind.trained(dataclasses.replace(setup, moved=Moved(start.moved(task.parameters()))), task)
    with evaluating(run), evaluating_together(processes, run, outcome):
        if not setup.sharded:
            processes.disband()
            if not processes.first:
                return FinetuneResult(setup, run, outcome)
        release_free_memory()  # for the second model of the certificate
        found = _reported(kind, setup, outcome, run, before=before, search=search, console=console)
        return FinetuneResult(setup, run, outcome, found)


def _reported(
    kind: RunKind[Any], setup: Any, outcome: Outcome, run: RunFolder, *, before: Digests, search: Search | None, console: Console
) -> Report | None:
    """Evaluates and certifies, then writes and prints report and certificate in the first process (None in others).

    Raises VerificationFailed if a check failed, before any command is recommended.
    """
    started = time.perf_counter()
    measured = kind.evaluate(setup, run, console)
    evaluated = time.perf_counter()
    console.print("Certificate: what was saved is read again and compared with what was trained.", soft_wrap=True)
    certificate = kind.certify(setup, run, before)
    times = PhaseTimes(outcome.seconds, evaluated - started, time.perf_counter() - evaluated)
    residency = setup.residency
    if residency.budget and residency.gpu is None:
        setup.memory.now()
        say_peak(setup.memory, residency, console)
    setup.processes.disband()  # no collective operation from here on
    if not setup.processes.first:
        return None
    certificate = identified(certificate, run.adapter, setup.config.model if kind.peft_adapter else None)
    report = complete(measured, kind, setup, outcome, run=run, certificate=certificate, times=times, search=search)
    with writing(f"The report in {run.path}", f"The adapter is whole. Free some space, then: {run.resume_command}"):
        write_report(report, run.path)
        if kind.peft_adapter:
            write_adapter_card(run.adapter, report, certificate, setup=setup, split=kind.split_record(setup))
    show_results(report, console)
    show_certificate(certificate, console)
    took = "; ".join(f"{phase} {text}" for phase, text in times.texts().items())
    console.print(f"Time: {took}.", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {run.page}   Adapter: {run.adapter}   Certificate: {run.certificate}", soft_wrap=True)
    certificate.raise_if_failed()
    for item in report.next_commands:
        console.print(f"Next: {item.command}   ({item.purpose})", markup=False, highlight=False, soft_wrap=True)
    return report


def _check_try_rates(config: RunConfig, options: FinetuneOptions, kind: RunKind[Any]) -> None:
    """Raises ConfigError if --try-rates cannot be used."""
    if not options.try_rates:
        return
    problems = Problems("--try-rates cannot be used")
    if options.resume is not None:
        problems.add(f"{options.resume} has its learning rate already, and a resumed run keeps it. Leave --try-rates out.")
    if not kind.tries_rates:
        problems.add(f"{what_trains(config)}, and no rates are tried for that. Leave --try-rates out; compare whole runs.")
    if config.train.rate_trial_steps < FEWEST_STEPS:
        steps = config.train.rate_trial_steps
        problems.add(f"train.rate_trial_steps is {steps}, which tries none. Give the number of steps to try, such as 12.")
    problems.raise_if_any()


def _require_run(run: RunFolder, *, resume: bool) -> None:
    """Opens a run to resume it, or checks that a new one can be written."""
    if resume:
        RunFolder.open(run.path)
        return
    require_new_run(run)
