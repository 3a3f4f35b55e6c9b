"""Several training seeds of one run: what is refused, how far their results spread, and the report that says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lorakeet.config import RunConfig, read_run
from lorakeet.disk import read_regular, write_whole
from lorakeet.errors import Problems
from lorakeet.evaluate.intervals import Estimate, mean_over_seeds
from lorakeet.evaluate.report.report import Report, SeedSpread, write_report
from lorakeet.evaluate.verdict import ONE_SEED, circumstances, noted
from lorakeet.evaluate.wording import metric_words
from lorakeet.train.run import RunFolder
from lorakeet.verbs.options import FinetuneOptions


def require_repeatable(config: RunConfig, options: FinetuneOptions, processes: int) -> None:
    """Raises ConfigError for a run that cannot be trained with several seeds, before anything is trained."""
    problems = Problems(f"--seeds {options.seeds} cannot be used")
    if options.seeds < 1:
        problems.add(f"--seeds is {options.seeds}; expected 1 or more.")
    if options.seeds > 1:
        if processes > 1:
            problems.add(f"{processes} processes train together. Start one process, or leave --seeds out.")
        if config.memory.limit:
            problems.add("memory.budget counts one run, and the seeds are trained in one process. Leave one of them out.")
        if why := config.declaration.lacks.get("seeds"):
            problems.add(why, code="kind-lacks", values={"kind": config.declaration.name, "what": "seeds"})
    problems.raise_if_any()


def seeds_of(config: RunConfig, run: RunFolder, count: int) -> dict[int, RunFolder]:
    """The folders of the seeds, the run itself first: it keeps the adapter of train.seed, whatever the others give."""
    first = config.train.seed
    return {first: run} | {seed: RunFolder(run.path / "seeds" / str(seed)) for seed in range(first + 1, first + count)}


def config_of_seed(run: RunFolder, seed: int, out: Path) -> RunConfig:
    """The finished run's settings, its learning rate included, with another seed; the rows stay those of the run."""
    return dataclasses.replace(read_run(run.config).changed(train={"seed": seed}), out=str(out))


def with_seeds(report: Report, others: Mapping[int, Report], confidence: float, first: int) -> Report:
    """The report of the `first` seed with the spread of each compared metric over all seeds, which the headline names too."""
    reports = {first: report, **others}
    spreads = []
    for metric in dict.fromkeys(one.metric for one in report.comparisons):
        found = {seed: adapter[metric] for seed, each in reports.items() if metric in (adapter := _adapter(each))}
        if len(found) == len(reports):
            values = tuple(one.value for one in found.values())
            spreads.append(SeedSpread(metric, tuple(found), values, mean_over_seeds(values, confidence)))
    if not spreads:
        return report
    main = spreads[0]
    words = metric_words(main.metric)
    given = f"{words.level(min(main.values))} to {words.level(max(main.values))} {words.inline}"
    said = f"{len(reports)} seeds give {given}, in the mean {words.level(main.mean.value)} ({words.ends(main.mean)})"
    seeds = f"{said}; this adapter is seed {first}'s, the first"
    verdict = report.verdict
    if verdict is not None:
        phrases = tuple(phrase for phrase in verdict.phrases if not phrase.text.endswith(ONE_SEED))
        verdict = noted(dataclasses.replace(verdict, phrases=phrases), circumstances(report.part, seeds))
    return dataclasses.replace(report, verdict=verdict, seeds=tuple(spreads))


def write_seeds(report: Report, before: Report, run: RunFolder) -> None:
    """Writes the report, and its headline into the adapter's README.md."""
    write_report(report, run.path)
    readme = run.adapter / "README.md"
    if before.verdict is not None and report.verdict is not None and readme.is_file():
        text = read_regular(readme).decode().replace(before.verdict.sentence, report.verdict.sentence)
        write_whole(readme, text.encode())


def _adapter(report: Report) -> dict[str, Estimate]:
    return next((system.metrics for system in report.systems if system.role == "adapter"), {})
