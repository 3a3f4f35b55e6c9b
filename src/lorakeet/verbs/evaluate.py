"""`lorakeet evaluate`: evaluates a run or any adapter against its base, on the rows of the run or of a file."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.data.chat import Encoder
from lorakeet.data.copies.prompt_leaks import prompt_leak_notes
from lorakeet.data.leaks import LeakReport, search_leaks
from lorakeet.data.prepare import check_labels, find_labels
from lorakeet.data.read import read_rows
from lorakeet.data.rows import Row
from lorakeet.data.spec import DataSpec
from lorakeet.data.split import read_split_record
from lorakeet.data.tables import given_name
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem, LorakeetError
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
from lorakeet.memory.cuda import enforcing_gpu_budget
from lorakeet.planning.encoded_rows import within_context
from lorakeet.planning.evaluation import fit_evaluation
from lorakeet.planning.forecast_text_run import Workload
from lorakeet.replying.harness import HarnessTasks, require_tasks, run_tasks, tasks_report
from lorakeet.runs.open_adapter import NAME, Opened, open_adapter
from lorakeet.runs.output_paths import require_empty, writing
from lorakeet.runs.residency import peak_said
from lorakeet.verbs.options import EvaluateOptions, require_only

FEWEST = 5  # rows from which on a conclusion is drawn
HELD_OUT = "the held-out rows"


@dataclass(frozen=True)
class Evaluated:
    """The measured report."""

    report: Report

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return dict(encode(self.report))


@dataclass(frozen=True)
class _EvaluationRows:
    """The rows to evaluate on, their name and labels, and the rows that simple baselines are fitted to."""

    rows: tuple[Row, ...]
    named: str
    labels: tuple[str, ...]
    baseline_rows: tuple[Row, ...]
    leaks: LeakReport | None = None
    warnings: tuple[str, ...] = ()


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
    opened = open_adapter(
        path, base=options.base, config=options.config, uncertified=options.uncertified, say=console.print
    ).within(options.memory)
    opened = dataclasses.replace(opened, config=with_judge_of(opened.config, options.judge))
    if options.tasks:
        return _written(_noted(_on_tasks(options, opened, console), opened.note), options, console)
    require_encodable(opened.config)
    rows = _rows_of_file(opened, options.data) if options.data else _rows_of_run(opened)
    measured = "held-out rows" if rows.named == HELD_OUT else f"rows of {rows.named}"
    for known in (*rows.warnings, f"{len(rows.rows):,} {measured} are measured."):
        console.print(known, markup=False, soft_wrap=True)
    given = opened.config.changed(evaluate={"metric": options.metric})
    if ignored := without_effect(given, rows.rows, rows.labels):
        console.print(ignored, style="yellow", markup=False, soft_wrap=True)
    workload = Workload(bool(rows.labels), sum(len(row.text) for row in rows.rows))
    residency = fit_evaluation(opened.config, opened.adapter, partial(console.print, markup=False, soft_wrap=True), workload)
    with enforcing_gpu_budget(residency.budget, "Raise it with --memory."), peak_said(residency, console):
        text = dataclasses.replace(opened, residency=residency).text_model(console)
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
    say = partial(console.print, markup=False, soft_wrap=True)
    residency = fit_evaluation(config, opened.adapter, say, Workload(False, 0))
    with enforcing_gpu_budget(residency.budget, "Raise it with --memory."), peak_said(residency, console):
        text = dataclasses.replace(opened, residency=residency).text_model(console)
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


def _rows_of_run(opened: Opened) -> _EvaluationRows:
    if not opened.config.data.train:
        raise ConfigError("An adapter without a run has no rows. Name a file with --data, or a run file with --config.")
    dataset = opened.dataset
    if dataset.test:
        return _EvaluationRows(dataset.test, "the test file", dataset.labels, (*dataset.train, *dataset.held_out))
    return _EvaluationRows(dataset.held_out, HELD_OUT, dataset.labels, dataset.train)


def _named(data: str) -> str:
    return Path(data).name if given_name(data) == data else given_name(data)


def _rows_of_file(opened: Opened, data: str) -> _EvaluationRows:
    """The rows of `data`, read as the run's rows are, with the labels of the run or else of the file.

    The run's own rows are used for the leak check and the baselines only: if they cannot be read, a warning says so.
    """
    settings: RunConfig = opened.config
    dropped: list[str] = []
    registered = settings.train.registered
    given = read_rows(data, dataclasses.replace(settings.data, limit=None), dropped, registered)
    rows = registered.taken(given, "evaluated", trained=False)
    dropped += prompt_leak_notes({"evaluated": rows}, settings.data.on_leak)
    if not settings.data.train:
        return _EvaluationRows(rows, _named(data), find_labels(rows, settings.data), (), warnings=tuple(dropped))
    try:
        dataset = opened.dataset
    except (DataError, EnvironmentProblem) as error:
        found_rows = _rows_without_training(opened, rows, _named(data), error)
        return dataclasses.replace(found_rows, warnings=(*dropped, *found_rows.warnings))
    _require_shape(rows, dataset.labels, settings.data, _named(data))
    check_labels({"evaluated": rows}, dataset.labels)
    known = (*dataset.train, *dataset.held_out)
    left, found = _without_seen(rows, known, settings.data)
    seen = len(rows) - len(left)
    fate = "left out" if settings.data.on_leak == "drop" else "kept, as data.on_leak says: the verdict is not on unseen rows"
    said = [f"{_counts_of_copies(rows, found, seen or len(found.across))} ({fate})."] if found.across else []
    return _EvaluationRows(left, _named(data), dataset.labels, known, found, (*dropped, *said))


def _require_shape(rows: Sequence[Row], labels: Sequence[str], trained: DataSpec, named: str) -> None:
    """Raises DataError for a file of labelled texts where the run has none, and the other way round."""
    labelled = [row.label is not None for row in rows]
    if labels and not any(labelled):
        columns = f"{trained.text_column!r} and {trained.label_column or 'label'!r}"
        raise DataError(
            f"{named} has no labels, but the run was trained on labelled texts. Give a file with the columns {columns}. Rows "
            "without labels are answered by: lorakeet predict"
        )
    if all(labelled) and not labels:
        like = f", {Path(trained.train).name}" if trained.train else ""
        raise DataError(
            f"{named} has texts with a label, but the run was trained on rows of another shape. Give a file with the columns of "
            f"its training rows{like}."
        )


def _counts_of_copies(rows: Sequence[Row], found: LeakReport, count: int) -> str:
    """How many of the rows the run has seen, and how many of them are only near-copies of what it has seen."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for pair in found.across:
        kinds[pair.row.source if pair.row_part == "test" else pair.twin.source].add(pair.kind)
    near = sum(kind == {"near"} for kind in kinds.values())
    if near == len(kinds):
        return f"{count} of {len(rows)} rows are near-copies of training or held-out rows"
    also = f", {near} of them as near-copies" if near else ""
    return f"{count} of {len(rows)} rows are also training or held-out rows{also}"


def _rows_without_training(opened: Opened, rows: tuple[Row, ...], named: str, why: LorakeetError) -> _EvaluationRows:
    """The rows of a file if the run's are gone: labels and hashes of the held-out rows are in its split.json."""
    policy = opened.config.data.on_leak
    if opened.run is None or policy == "refuse":
        raise why
    record = read_split_record(opened.run.split)
    labels, held_out = record.get("labels"), record["held_out"]
    if not isinstance(labels, list) or not isinstance(held_out, list):
        raise why
    _require_shape(rows, [*map(str, labels)], opened.config.data, named)
    check_labels({"evaluated": rows}, [*map(str, labels)])
    seen = set(map(str, held_out))
    left = tuple(row for row in rows if row.key not in seen) if policy == "drop" else rows
    if not left:
        raise DataError(f"All {len(rows)} rows are held-out rows of the run. Name a file of other rows.") from why
    said = [f"The run's own rows cannot be read ({why}) So copies of training rows were not removed, and there are no baselines."]
    if len(left) < len(rows):
        said.append(f"{len(rows) - len(left)} of {len(rows)} rows are held-out rows of the run (left out).")
    return _EvaluationRows(left, named, tuple(map(str, labels)), (), None, tuple(said))


def _without_seen(rows: tuple[Row, ...], known: tuple[Row, ...], spec: DataSpec) -> tuple[tuple[Row, ...], LeakReport]:
    """The rows without those that the run has seen, as data.on_leak says, and the leaks that were found."""
    found = search_leaks({"training": known, "test": rows}, spec)
    pairs = found.across
    sources = {pair.row.source if pair.row_part == "test" else pair.twin.source for pair in pairs}
    seen = tuple(row for row in rows if row.source in sources)
    if pairs and spec.on_leak == "refuse":
        advice = "Remove them, or set data.on_leak to drop or keep."
        raise DataError(f"{len(seen)} rows were seen in training, first {pairs[0]}. {advice}")
    left = tuple(row for row in rows if row.source not in sources) if spec.on_leak == "drop" else rows
    if not left:
        raise DataError(f"All {len(rows)} rows were seen in training, so they show nothing. Name a file of other rows.")
    return left, dataclasses.replace(found, pairs=pairs, dropped=seen if spec.on_leak == "drop" else ())
