"""Prints a run in the terminal: rows or pictures, plan, memory, results and certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress as Bar
from rich.text import Text

from lorakeet.core.plan import Plan
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.replies import SCORES
from lorakeet.evaluate.report.report import Report
from lorakeet.evaluate.report.target_row import TargetRow
from lorakeet.evaluate.wording import MetricWords, all_metric_words, bytes_text, metric_words, number, span
from lorakeet.kinds.trained_targets import STAYED, target_rows
from lorakeet.memory.forecast import KINDS, Forecast
from lorakeet.models.module_kinds import VECTORS
from lorakeet.runs.terminal import WholeTable

if TYPE_CHECKING:  # a run imports the modules of its own kind only
    from lorakeet.kinds.protocol import PlanResult

# short, so that the table is narrow
_HEADINGS = {"gradients": "grads", "saved activations": "saved", "allocator": "alloc."}

BESIDE = ("absolute_error", "rank_correlation", "mean_distance", "quadratic_kappa", "set_match", "chrf")  # shown of replies


def show_targets(plan: Plan, remarks: Iterable[str], console: Console) -> None:
    """Prints what is trained of each kind of module, and the remarks on it."""
    _show_rows_of_targets(target_rows(plan), remarks, console)


def _show_rows_of_targets(rows: Sequence[TargetRow], remarks: Iterable[str], console: Console) -> None:
    """A line for each kind of module but vectors that are left out: they have no pair anywhere."""
    shown = [row for row in rows if row.kind != VECTORS or row.whole]
    if not shown:
        return
    moved = ("moved",) if any(row.moved is not None for row in shown) else ()
    columns = ("module", "tensors", "pairs", *moved, "remarks")
    table = WholeTable(title="Targets by kind of module", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in ("tensors", "pairs", "moved") else "left")
    for row in shown:
        table.add_row(*map(Text, row.cells()))
    console.print(table)
    for line in remarks:
        console.print(Text(line, style="yellow"))


def show_counts(name: str, data: Any, console: Console) -> None:
    """Prints how many rows each part of the data set has."""
    counts = f": {len(data.train)} training, {len(data.held_out)} held-out, {len(data.test)} test"
    console.print(Text.assemble((name, "bold"), counts))


def show_plan(columns: tuple[str, str], rows: Iterable[tuple[str, ...]], plan: Plan, console: Console) -> None:
    """Prints `rows` of the plan as a table, the first two columns named `columns`, and its summary."""
    table = WholeTable(*columns, "rank", "scale", "parameters", title="Plan", title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    console.print(Text(plan.summary()))


def show_results(report: Report, console: Console) -> None:
    """Prints every system's metrics with their intervals, the paired differences, and the verdict."""
    found, known = {name for system in report.systems for name in system.metrics}, all_metric_words()
    names = [name for name in known if name in found] + sorted(found - known.keys())
    replied = any(name in SCORES for name in names) and report.task == "language"
    if replied:
        names = [name for name in names if name in (report.comparisons[0].metric, "exact_match", *BESIDE, "cut_off", "loss")]
    table = WholeTable("", *(metric_words(name).title for name in names), title=Text(report.subtitle), title_justify="left")
    for system in report.systems:
        cells = (_cell(system.metrics.get(name), metric_words(name)) for name in names)
        table.add_row(system.name, *cells, style="bold" if system.role == "adapter" else "")
    console.print(table)
    columns = ("difference", "metric", "value", "p", "verdict")
    differences = WholeTable(*columns, title="Paired, on the same rows", title_justify="left")
    said = "" if report.verdict is None else report.verdict.sentence
    for item in report.comparisons:
        words, diff = metric_words(item.metric), item.difference
        value = f"{words.change(diff.value)} [{words.ends(diff, signs=True, between=', ')}]"
        if replied and item.metric not in (*names, report.comparisons[0].metric) and f" {words.inline}" not in said:
            continue  # the report has them all
        p = f"{item.p_value:.2g} ({item.test})"
        differences.add_row(f"{item.left} − {item.right}", words.title, Text(value), p, item.verdict)
    if report.comparisons:
        console.print(differences)
    if report.reading:
        console.print(report.reading, markup=False, highlight=False, soft_wrap=True)
    _show_rows_of_targets(report.targets, [line for line in report.warnings if line.startswith(STAYED)], console)
    if report.drift is not None:
        kl = report.drift.mean_kl
        drift = f"{number(kl.value, 4)} [{span(kl, 4, between=', ')}] nats a token"
        console.print(Text(f"Drift from the base: {drift} on {report.drift.texts} texts"))
    if report.verdict is not None:
        console.print(Text(report.verdict.sentence, style="bold"))
    if report.memorisation is not None:
        near, count = report.memorisation.suspicious, len(report.memorisation.nearest)
        console.print(f"{near} of {count} samples are nearer to a training picture than any evaluated picture is")


@contextmanager
def progress_line(console: Console, what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A live line while something is done part by part: its function takes the number done, that of all, and a name."""
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=f"{what} {name}")


def show_certificate(certificate: Certificate, console: Console) -> None:
    """Prints a line for each check, for the modules of each server, and for each thing that was not checked."""
    for check in certificate.checks:
        console.print(Text(str(check), style="green" if check.passed else "bold red"))
    for name, why in certificate.incomplete.items():
        console.print(Text(f"incomplete: {name}: {why}", style="bold yellow"), soft_wrap=True)
    for served in certificate.modules:
        console.print(Text(str(served), style="bold red" if served.missing else "green" if served.proved else "bold yellow"))
    for missing in certificate.unchecked:
        console.print(Text(str(missing), style="yellow"))
    if certificate.passed and (certificate.failed_artefacts or certificate.unproved_artefacts):
        console.print(Text(f"{certificate.verdict}.", style="bold yellow"))


def conclude(certificate: Certificate, console: Console) -> None:
    """Prints the certificate. Raises VerificationFailed if a check failed."""
    show_certificate(certificate, console)
    certificate.raise_if_failed()


def show_peak(result: PlanResult, console: Console, how: str = "") -> None:
    """Prints the peak of a planned run against its budget; `how` says how it is computed."""
    against = ""
    if bound := result.bound:
        left = bound.bytes - result.peak
        difference = f"{bytes_text(left)} less than" if left >= 0 else f"{bytes_text(-left)} more than"
        against = f"{how}, {difference} {f'the {bound} free on {bound.free}' if bound.free else f'the budget of {bound}'}"
    console.print(f"Peak of the run: {bytes_text(result.peak)}{against}.", soft_wrap=True)
    if later := result.later_commands:
        console.print(f"Not part of the run: {' and '.join(later)}, which are commands of their own.", soft_wrap=True)


def show_advice(result: PlanResult, console: Console, hows: tuple[str, str] = ("", "")) -> None:
    """Prints what would lower the peak of a planned run; `hows` are words for weights in memory and for streamed ones."""
    for item in result.advice:
        fits = "fits" if item.peak <= result.bound.bytes else "is still too much"
        console.print(f"  {item.change}: {bytes_text(item.peak)}{hows[item.streamed]}, {fits}", soft_wrap=True)


def memory_table(forecast: Forecast, device: str | None = None) -> WholeTable:
    """A table of the bytes at the peak of each phase, by kind: of the process, or on a CUDA `device`."""
    shown = [kind for kind in KINDS if any(kind in phase.kinds for phase in forecast.phases)]
    unit, size, digits = ("GiB", 1 << 30, 2) if forecast.peak.bytes >= 1 << 30 else ("MiB", 1 << 20, 1)
    where, keeper = (f"on {device}", "torch's allocator") if device else ("of the process", "the C library")
    title = f"Memory {where} at the peak of each phase, in {unit}"
    caption = f"saved: activations kept for the backward pass; alloc.: freed memory that {keeper} keeps"
    table = WholeTable(title=title, caption=caption, title_justify="left", caption_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("phase", *shown, "all"):
        table.add_column(_HEADINGS.get(column, column), justify="left" if column == "phase" else "right")
    for phase in forecast.phases:
        cells = [f"{phase.kinds[kind] / size:.{digits}f}" if kind in phase.kinds else "" for kind in shown]
        table.add_row(phase.name, *cells, Text(f"{phase.bytes / size:.{digits}f}", style="bold"))
    return table


def _cell(estimate: Estimate | None, words: MetricWords) -> Text:
    if estimate is None:
        return Text("")
    return Text(f"{words.level(estimate.value)} [{words.ends(estimate, between=', ')}]")


def show_matrices(found: Mapping[str, tuple[int, float]], console: Console) -> None:
    """A table of the rank and the relative error of each matrix."""
    table = WholeTable("matrix", "rank", "relative error", title="‖ΔW − B·A‖ / ‖ΔW‖", title_justify="left")
    for path, (rank, error) in found.items():
        table.add_row(Text(path), str(rank), f"{error:.4f}")
    console.print(table)
