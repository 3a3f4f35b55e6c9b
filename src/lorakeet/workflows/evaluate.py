"""`lorakeet evaluate`: measures a run or any adapter against its base, on the rows of the run or of a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.data.chat import Encoder
from lorakeet.data.prepare import check_labels, find_labels, load_dataset
from lorakeet.data.read import read_rows
from lorakeet.data.rows import Row
from lorakeet.errors import ConfigError
from lorakeet.evaluate.report import Report, write_report
from lorakeet.evaluate.values import encode
from lorakeet.workflows.assemble import within_context
from lorakeet.workflows.judge import Judge
from lorakeet.workflows.opened import NAME, Opened, open_adapter
from lorakeet.workflows.place import require_empty, writing
from lorakeet.workflows.show import show_results


@dataclass(frozen=True)
class Evaluated:
    """The measured report."""

    report: Report

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        found: dict[str, Any] = encode(self.report)
        return found


@dataclass(frozen=True)
class _Rows:
    """The rows to judge, what to call them, their labels, and the rows that a floor may learn from."""

    rows: tuple[Row, ...]
    named: str
    labels: tuple[str, ...]
    learnt_from: tuple[Row, ...]


def evaluate(
    run_or_adapter: str,
    *,
    data: str | None = None,
    config: Path | None = None,
    base: str | None = None,
    out: Path | None = None,
    console: Console,
) -> Evaluated:
    """Measures base and adapter on `data`, or on the test (else held-out) rows of the run; writes a report to `out` if named."""
    if out is not None:
        require_empty(out)
    opened = open_adapter(Path(run_or_adapter), base=base, config=config)
    rows = _rows_of_file(opened, data) if data else _rows_of_run(opened)
    text = opened.text_model(console)
    settings = within_context(opened.config, text, console)
    encoder = Encoder(text.tokenizer, settings.data, rows.labels)
    judge = Judge(settings, text, encoder, rows.rows, console, NAME)
    report = judge.report(f"{run_or_adapter} on {rows.named}", learnt_from=rows.learnt_from)
    report = dataclasses.replace(report, subtitle=f"{text.name}, {len(rows.rows)} rows of {rows.named}", drift=judge.drift())
    if out is not None:
        with writing(f"The report in {out}", "Free some space, or choose another --out."):
            out.mkdir(parents=True, exist_ok=True)
            write_report(report, out)
        console.print(f"Report: {out / 'report.html'}", soft_wrap=True)
    show_results(report, console)
    return Evaluated(report)


def _rows_of_run(opened: Opened) -> _Rows:
    if not opened.config.data.train:
        raise ConfigError("A bare adapter brings no rows; name a file with --data, or a run file with --config.")
    dataset = load_dataset(opened.config.data)
    if dataset.test:
        return _Rows(dataset.test, "the test file", dataset.labels, (*dataset.train, *dataset.held_out))
    return _Rows(dataset.held_out, "the held-out rows", dataset.labels, dataset.train)


def _rows_of_file(opened: Opened, data: str) -> _Rows:
    """The rows of `data`, read as the run's rows are; labels are the run's where it has a run, else those of the file."""
    settings: RunConfig = opened.config
    rows = tuple(read_rows(data, dataclasses.replace(settings.data, limit=None)))
    if not settings.data.train:
        return _Rows(rows, Path(data).name, find_labels(rows, settings.data), ())
    dataset = load_dataset(settings.data)
    check_labels({"evaluated": rows}, dataset.labels)
    return _Rows(rows, Path(data).name, dataset.labels, (*dataset.train, *dataset.held_out))
