"""`lorakeet evaluate`: evaluates a run or any adapter against its base, on the rows of the run or of a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.data.chat import Encoder
from lorakeet.errors import ConfigError
from lorakeet.evaluate.own_metric import load_metric
from lorakeet.evaluate.report.report import Report, write_report
from lorakeet.evaluate.values import encode
from lorakeet.evaluate.verdict import circumstances, noted
from lorakeet.formats.identity import Uncertified, require_certified
from lorakeet.kinds.protocol import run_kind, run_without_text
from lorakeet.kinds.report import leaks
from lorakeet.kinds.terminal import show_results
from lorakeet.kinds.text.evaluate import require_encodable
from lorakeet.kinds.text.kept_answers import kept_answers
from lorakeet.kinds.text.reply import without_effect
from lorakeet.planning.encoded_rows import within_context
from lorakeet.planning.evaluation import model_to_measure
from lorakeet.planning.forecast_text_run import Workload
from lorakeet.replying.harness import HarnessTasks, require_tasks, run_tasks, tasks_report
from lorakeet.runs.evaluated_rows import HELD_OUT, rows_of_file, rows_of_run
from lorakeet.runs.open_adapter import NAME, Opened, open_by_options
from lorakeet.runs.output_paths import require_empty, writing
from lorakeet.verbs.options import EvaluateOptions, require_only

FEWEST = 5  # rows from which on a conclusion is drawn


@dataclass(frozen=True)
class Evaluated:
    """The measured report."""

    report: Report

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return dict(encode(self.report))


def evaluate(options: EvaluateOptions, *, console: Console) -> Evaluated:
    """Evaluates base and adapter on `data`, on `tasks`, or on the test (else held-out) rows of the run; a report goes to `out`.

    Keeps to `memory`, or else to the run's memory.budget, if need be by streaming the weights.
    """
    if (out := options.out) is not None:
        require_empty(out)
    own = None if options.metric is None else load_metric(options.metric)
    path = Path(options.run_or_adapter)
    if options.config is None and (other := run_without_text(path)) is not None:
        kind, run, config = other
        require_only(options, ("run_or_adapter", "data", "out", "uncertified"), config.kind)
        note = require_certified(path, uncertified=options.uncertified, say=console.print)
        return _written(_noted(kind.evaluate_run(run, config, options.data, console), note), options, console)
    opened = open_by_options(path, options, console, config=options.config)
    opened = dataclasses.replace(opened, config=with_judge_of(opened.config, options.judge))
    if options.tasks:
        return _written(_noted(_on_tasks(options, opened, console), opened.note), options, console)
    require_encodable(opened.config)
    rows = rows_of_file(opened, options.data) if options.data else rows_of_run(opened)
    measured = "held-out rows" if rows.named == HELD_OUT else f"rows of {rows.named}"
    for known in (*rows.warnings, f"{len(rows.rows):,} {measured} are measured."):
        console.print(known, markup=False, soft_wrap=True)
    given = opened.config.changed(evaluate={"metric": options.metric})
    if ignored := without_effect(given, rows.rows, rows.labels):
        console.print(ignored, style="yellow", markup=False, soft_wrap=True)
    workload = Workload(bool(rows.labels), sum(len(row.text) for row in rows.rows))
    with model_to_measure(opened, console, workload) as (text, residency):
        settings = within_context(opened.config, text.name, text.context, partial(console.print, markup=False, soft_wrap=True))
        encoder = Encoder(text.tokenizer, settings.data, rows.labels)
        evaluator = run_kind(settings).evaluator(opened.run)(settings, text, encoder, rows.rows, console, NAME, own, residency)
        folder = None if opened.run is None else opened.run.path
        evaluator = dataclasses.replace(evaluator, kept=kept_answers(settings, text, folder))
        report = evaluator.report(f"{options.run_or_adapter} on {rows.named}", baseline_rows=rows.baseline_rows)
        drift = evaluator.drift()
    found = rows.leaks
    if rows.named == HELD_OUT:
        report = dataclasses.replace(report, verdict=noted(report.verdict, circumstances("held-out")))
    if report.rows_of < FEWEST:
        few = f"Only {report.rows_of} of the rows could be measured: too few for a conclusion, which takes {FEWEST} at least."
        report = dataclasses.replace(report, verdict=None, warnings=(few, *report.warnings))
    report = dataclasses.replace(
        report,
        subtitle=f"{text.name}, {report.rows_of} rows of {rows.named}",
        part="held-out" if rows.named == HELD_OUT else "test",
        drift=drift,
        leaks=None if found is None else leaks(found),
        leak_search="" if found is None else found.method(),
        warnings=(*rows.warnings, *report.warnings),
    )
    report = _noted(report, opened.note)
    return _written(report, options, console, said=rows.warnings)


def _noted(report: Report, note: str) -> Report:
    """The report with how the adapter was compared with its certificate, unless it is what was certified."""
    if not note:
        return report
    warnings = (f"The adapter is {note}.", *report.warnings) if isinstance(note, Uncertified) else report.warnings
    return dataclasses.replace(report, facts={**report.facts, "Adapter": note}, warnings=warnings)


def _written(report: Report, options: EvaluateOptions, console: Console, said: Sequence[str] = ()) -> Evaluated:
    """Shows the report, but for what was `said` of its warnings, and writes it to `options.out`, if that is given."""
    for warning in report.warnings:
        if warning not in said:
            console.print(warning, markup=False, soft_wrap=True)
    if (out := options.out) is not None:
        with writing(f"The report in {out}", "Free some space, or choose another --out."):
            out.mkdir(parents=True, exist_ok=True)
            write_report(report, out)
        console.print(f"Report: {out / 'report.html'}", soft_wrap=True)
    show_results(report, console)
    return Evaluated(report)


def _on_tasks(options: EvaluateOptions, opened: Opened, console: Console) -> Report:
    """The report on tasks of lm-evaluation-harness. Under a memory budget their prompts have at most data.max_tokens tokens."""
    given = {"--data": options.data, "--metric": options.metric, "--judge": options.judge}
    if beside := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"--tasks has rows and metrics of its own, and {', '.join(beside)} stands beside it. Leave one out.")
    wanted = HarnessTasks(options.tasks, options.task_folder, options.task_rows, options.task_examples, options.task_chat)
    require_tasks(wanted)
    config = opened.config
    with model_to_measure(opened, console, Workload(False, 0)) as (text, residency):
        context = text.context or config.data.max_tokens
        longest = (min(config.data.max_tokens, context) if residency.budget else context) - 1
        found = run_tasks(text, wanted, adapter=NAME, longest=longest, micro_tokens=config.train.micro_tokens, console=console)
    report = tasks_report(f"{options.run_or_adapter} on {', '.join(options.tasks)}", found, config.evaluate)
    return dataclasses.replace(report, subtitle=f"{text.name}, tasks of lm-evaluation-harness", part="test")


def with_judge_of(config: RunConfig, judge: str | None) -> RunConfig:
    """The settings with another judge; that of the run is not called again by itself. Raises ConfigError if it is no address."""
    changed = config.changed(evaluate={"judge": judge})
    changed.evaluate.validate()
    return changed

