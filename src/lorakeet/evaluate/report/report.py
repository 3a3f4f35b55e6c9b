"""report.json and report.html: all measurements of a run, as JSON and as one page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import jinja2
from markupsafe import Markup

from lorakeet.disk import read_regular
from lorakeet.errors import DataError, Remedy, percent, reader
from lorakeet.evaluate.answers import Confusion
from lorakeet.evaluate.calibration import ReliabilityBin
from lorakeet.evaluate.certificate import CERTIFICATE, Certificate, digest_of_json, pop_digest, read_certificate, with_digest
from lorakeet.evaluate.compare import Comparison
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.report import charts
from lorakeet.evaluate.report.charts import Curves
from lorakeet.evaluate.report.rank_values import RankCurve, RankMap, Search, curve_plot
from lorakeet.evaluate.report.target_row import TargetRow
from lorakeet.evaluate.report.templates import page_templates
from lorakeet.evaluate.suspects import SuspectLabel
from lorakeet.evaluate.values import decode, from_text, put_text, to_text
from lorakeet.evaluate.verdict import Verdict
from lorakeet.evaluate.wording import all_metric_words, bytes_text, check_words, compact, metric_words, number, signed, span
from lorakeet.registry import declarations

Role = Literal["adapter", "base", "floor"]
OUTCOMES = {"fixed": "adapter fixed", "broke": "adapter broke", "both-wrong": "both wrong", "both-right": "both right"}


@dataclass(frozen=True)
class SystemResult:
    """One row of the table: a system, its role, its metrics by name, and a note."""

    name: str
    role: Role
    metrics: dict[str, Estimate]
    note: str = ""


@dataclass(frozen=True)
class Reliability:
    """A system's reliability curve."""

    system: str
    role: Role
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class ScoredAnswer:
    """One system's answer to a row: text, probability, correctness, loss in nats per token, and a score from 0 to 1."""

    text: str = ""
    probability: float | None = None
    right: bool | None = None
    loss: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class SideBySide:
    """A held-out row with the replies of base and adapter.

    For a comparison of two reports: `place` among the rows that were measured, the target `tokens` of its loss, and its `group`
    of rows that depend on each other. None in reports of earlier versions; `group` also where each row stands for itself.
    """

    text: str
    truth: str
    base: ScoredAnswer
    adapter: ScoredAnswer
    source: str = ""
    place: int | None = None
    tokens: int | None = None
    group: str | None = None

    @property
    def outcome(self) -> str:
        """fixed, broke, both-right or both-wrong; empty if replies are not right or wrong."""
        if self.base.right is None or self.adapter.right is None:
            return ""
        if self.base.right == self.adapter.right:
            return "both-right" if self.base.right else "both-wrong"
        return "fixed" if self.adapter.right else "broke"


@dataclass(frozen=True)
class Leak:
    """A row in two parts of the data: its sources, the similarity, the action taken, its kind, and what stands in both."""

    held_out: str
    train: str
    similarity: float
    action: str
    text: str = ""
    kind: str = ""
    twin_text: str = ""


@dataclass(frozen=True)
class Drift:
    """The adapter's drift from its base on `texts` texts sampled from the base: mean KL(base ‖ adapter) per token."""

    mean_kl: Estimate
    texts: int
    detail: str = ""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one part of the run, planned and measured; None if unknown."""

    what: str
    planned: int | None
    used: int | None


@dataclass(frozen=True)
class Command:
    """A suggested next command and its purpose."""

    command: str
    purpose: str


@dataclass(frozen=True)
class Sample:
    """One drawn sample as base64 of a PNG; `column` names the adapter weight it was drawn with."""

    column: str
    png: str


@dataclass(frozen=True)
class SampleRow:
    """Samples of one prompt and seed, one for each weight."""

    prompt: str
    seed: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class SampleGrid:
    """Prompts × adapter weights, at equal seeds."""

    columns: tuple[str, ...]
    rows: tuple[SampleRow, ...]
    detail: str = ""  # sampler, steps, guidance


@dataclass(frozen=True)
class Near:
    """A sample and its nearest training row."""

    prompt: str
    seed: int
    column: str
    source: str  # of the training row
    distance: float
    suspicious: bool


@dataclass(frozen=True)
class SeedSpread:
    """One metric of the adapters of several training seeds on the same rows, and their mean with an interval between seeds."""

    metric: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: Estimate


@dataclass(frozen=True)
class Memorisation:
    """Checks samples for repeated training rows, with the evaluation rows as reference.

    `floor` is the least distance of an evaluation row (not trained on) from a training row; a nearer sample is
    suspicious. `typical` is the median of the evaluation rows' nearest distances.
    """

    nearest: tuple[Near, ...]
    floor: float
    typical: float
    evaluated: int = field(metadata={"key": "judged"})
    space: str  # the space of the distance

    @property
    def suspicious(self) -> int:
        return sum(near.suspicious for near in self.nearest)


@dataclass(frozen=True)
class Report:
    """All sections of a report; empty or None sections are left out of the page.

    `facts` are model, data, rows, seed, versions, hardware and commit, `speed` the rates and times, both as name and text.
    `rows` were drawn from the `rows_of` rows of the `part` ("held-out" or "test") that was evaluated.
    """

    title: str
    task: Literal[("classification", "language", *declarations())] = "classification"  # type: ignore[valid-type]
    subtitle: str = ""
    created: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    verdict: Verdict | None = None
    systems: tuple[SystemResult, ...] = ()
    reading: str = ""  # how answers are read, and by what that was decided
    comparisons: tuple[Comparison, ...] = ()
    seeds: tuple[SeedSpread, ...] = ()
    curves: Curves | None = None
    targets: tuple[TargetRow, ...] = ()
    ranks: RankMap | None = None
    rank_curve: RankCurve | None = None
    search: Search | None = None
    confusions: tuple[Confusion, ...] = ()
    reliabilities: tuple[Reliability, ...] = ()
    rows: tuple[SideBySide, ...] = ()
    rows_of: int = 0
    part: str = "held-out"
    suspects: tuple[SuspectLabel, ...] = ()
    leaks: tuple[Leak, ...] | None = None
    leak_search: str = ""
    drift: Drift | None = None
    samples: SampleGrid | None = None
    memorisation: Memorisation | None = None
    memory: tuple[MemoryUse, ...] = ()
    memory_budget: int | None = None
    speed: dict[str, str] = field(default_factory=dict)
    certificate: Certificate | None = None
    warnings: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()  # settings of another run, against what is warned of
    next_commands: tuple[Command, ...] = ()


def write_report(report: Report, folder: Path) -> None:
    """Writes report.json, with its own digest, report.html and, if it has one, the certificate into `folder`, each atomically."""
    text = to_text(report)
    if report.certificate is not None:
        replace(report.certificate, report=_measured(json.loads(text))).write(folder / CERTIFICATE)
    put_text(folder / "report.json", with_digest(text))
    put_text(folder / "report.html", render_html(report))


@reader("a report")
def read_report(path: Path) -> Report:
    """Reads a report.json. DataError if it cannot be read, was edited, or is not that of the certificate beside it."""
    return decode(Report, report_values(path), where=str(path))


def report_values(path: Path) -> dict[str, Any]:
    """What a report.json says, as JSON. DataError as of `read_report`."""
    try:
        text = read_regular(path).decode("utf-8")
    except FileNotFoundError as error:
        said = f"{path.parent} has no {path.name}: a run has its report when it has ended and was measured."
        raise DataError(f"{said} Resume the run, or train again.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the report {path}: {error}; expected a report.json that a run wrote.") from error
    data = from_text(dict[str, Any], text, where=str(path))
    if pop_digest(data) is False:
        raise DataError(f"{path} was edited after it was written: its digest does not match. Put back the original file.")
    beside = path.with_name(CERTIFICATE)
    if beside.is_file() and read_certificate(beside).report not in ("", _measured(data)):
        said = f"{path} is not the report that {beside} was written with. Put back the report of this run."
        if (path.parent / "checkpoints").is_dir():  # it may have been ended between writing the one and the other
            said += f" If there is no other, measure the run again: lorakeet finetune --resume {quote(str(path.parent))}"
        raise DataError(said)
    return data


def _measured(data: Mapping[str, Any]) -> str:
    """The digest of a report without its certificate, which `verify` adds to."""
    return digest_of_json({name: value for name, value in data.items() if name != "certificate"})


def _asset(name: str) -> str:
    return (files("lorakeet.evaluate.report") / name).read_text(encoding="utf-8")


@cache
def _templates() -> jinja2.Environment:
    """The page's templates, compiled on first use."""
    environment = page_templates(_asset)
    environment.filters.update(
        number=number, signed=signed, span=span, percent=percent, bytes=bytes_text, metric=metric_words, measure=check_words,
        compact=compact,
    )  # fmt: skip
    environment.globals.update(charts=charts, outcomes=OUTCOMES, rank_plot=curve_plot)
    return environment


def render_html(report: Report) -> str:
    """Renders one self-contained page: inline style, script and charts, nothing fetched, all data escaped."""
    known, present = all_metric_words(), dict.fromkeys(name for system in report.systems for name in system.metrics)
    of_kind = declarations().get(report.task)
    differences: dict[str, list[Comparison]] = {}
    for comparison in report.comparisons:
        differences.setdefault(comparison.metric, []).append(comparison)
    template = _templates().get_template("report.html.j2")
    return template.render(
        report=report,
        style=Markup(_asset("report.css")),
        script=Markup(_asset("report.js")),
        roles={system.name: system.role for system in report.systems},
        metrics=[*(name for name in known if name in present), *(name for name in present if name not in known)],
        row_unit=" nats" if of_kind is None else of_kind.row_unit,
        confidence=next((item.confidence for item in _estimates(report)), 0.95),
        seeds=sorted({item.seed for item in _estimates(report) if item.seed is not None}),
        pairs=next((item for item in report.comparisons if item.paired is not None), None),  # whose row counts are drawn
        differences=list(differences.items()),
        outcome_counts=Counter(row.outcome for row in report.rows),
        truths=list(dict.fromkeys(row.truth for row in report.rows)),
    )


def _estimates(report: Report) -> list[Estimate]:
    return [item for system in report.systems for item in system.metrics.values()] + [
        item.difference for item in report.comparisons
    ]
