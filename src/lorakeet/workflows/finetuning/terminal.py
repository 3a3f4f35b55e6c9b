"""What a run prints in the terminal: the plan, an example with its learnt tokens, memory, and the table of results."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakeet.data.chat import show_example
from lorakeet.data.template import uses_template
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.report.report import Report
from lorakeet.evaluate.wording import METRIC_WORDS, bytes_text, metric_words, number, signed
from lorakeet.memory.forecast import KINDS, Forecast
from lorakeet.workflows.finetuning.assemble_text import Assembly
from lorakeet.workflows.runs.pruning import cuts_text

_HEADINGS = {"gradients": "grads", "saved activations": "saved", "allocator": "alloc."}  # short, so that the table is narrow


def show_run_plan(setup: Assembly, console: Console) -> None:
    """The rows, the leaks, one example in colour, and which matrices get which rank."""
    data = setup.dataset
    counts = f": {len(data.train)} training, {len(data.held_out)} held-out, {len(data.test)} test"
    console.print(Text.assemble(("Rows", "bold"), counts))
    for line in data.leaks.lines():
        console.print(Text(line))
    for name, encoded in setup.encoded.items():
        if encoded.truncated or encoded.dropped:
            limit = f"{setup.config.data.max_tokens} tokens"
            console.print(f"{encoded.truncated} {name} rows shortened to {limit}, {len(encoded.dropped)} left out")
    if _lacks_template(setup):
        console.print("The tokenizer has no chat template, so turns are joined as raw text.", soft_wrap=True)
    console.print(Text.assemble(("One training row", "bold"), " (learnt tokens in green):"))
    console.print(show_example(setup.train.examples[0], setup.text.tokenizer))
    table = Table("path", "weight", "rank", "scale", "parameters", title="Plan", title_justify="left")
    for row in setup.plan.rows():
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    model = setup.config.model
    console.print(Text(setup.plan.summary()))
    if cuts := setup.cuts:
        console.print(cuts_text(cuts, setup.plan), soft_wrap=True)
    console.print(
        f"{setup.steps} steps of {setup.config.train.batch_size} rows, {setup.tokens_per_epoch:,} tokens a pass; "
        f"{model.dtype} weights, {model.products} products, {model.attention} attention on {model.device}"
    )
    planned = setup.residency.plan
    if planned is not None:
        place = "of this process" if setup.residency.gpu is None else f"on {setup.residency.gpu}"
        console.print(f"Memory: at most {bytes_text(planned.peak)} {place} planned, in the phase: {planned.highest.name}")


def _lacks_template(setup: Assembly) -> bool:
    """Whether turns with roles go without the template that they would otherwise get."""
    data, row = setup.config.data, setup.dataset.train[0]
    return data.chat_template == "auto" and bool(row.turns[0].role) and not uses_template(setup.text.tokenizer, data)


def show_results(report: Report, console: Console) -> None:
    """The verdict, every system's metrics with their intervals, and the paired differences."""
    names = [name for name in METRIC_WORDS if any(name in system.metrics for system in report.systems)]
    table = Table("", *(metric_words(name).title for name in names), title=Text(report.subtitle), title_justify="left")
    for system in report.systems:
        cells = (_cell(system.metrics.get(name), METRIC_WORDS[name].digits) for name in names)
        table.add_row(system.name, *cells, style="bold" if system.role == "adapter" else "")
    console.print(table)
    differences = Table("difference", "metric", "value", "p", "verdict", title="Paired, on the same rows", title_justify="left")
    for item in report.comparisons:
        words, diff = metric_words(item.metric), item.difference
        value = f"{signed(diff.value)} [{signed(diff.low)}, {signed(diff.high)}]"
        p = f"{item.p_value:.2g} ({item.test})"
        differences.add_row(f"{item.left} − {item.right}", words.title, Text(value), p, item.verdict)
    if report.comparisons:
        console.print(differences)
    if report.drift is not None:
        console.print(Text(f"Drift from the base: {_cell(report.drift.mean_kl, 4)} nats a token on {report.drift.texts} texts"))
    if report.verdict is not None:
        console.print(Text(report.verdict.sentence, style="bold"))


def show_certificate(certificate: Certificate, console: Console) -> None:
    """One line a check, and one for each thing that was not checked."""
    for check in certificate.checks:
        console.print(Text(str(check), style="green" if check.passed else "bold red"))
    for missing in certificate.unchecked:
        console.print(Text(str(missing), style="yellow"))
    if certificate.passed and certificate.failed_artefacts:
        console.print(Text(f"{certificate.verdict}.", style="bold yellow"))


def memory_table(forecast: Forecast, device: str | None = None) -> Table:
    """What a run will hold at the peak of each phase, by kind: the process, or of a CUDA `device`; within 80 columns."""
    shown = [kind for kind in KINDS if any(kind in phase.kinds for phase in forecast.phases)]
    unit, size, digits = ("GiB", 1 << 30, 2) if forecast.peak.bytes >= 1 << 30 else ("MiB", 1 << 20, 1)
    place, keeper = (f"on {device}", "torch's allocator") if device else ("of the process", "the C library")
    title = f"Memory {place} at the peak of each phase, in {unit}"
    caption = f"saved: activations kept for the backward pass; alloc.: freed memory that {keeper} keeps"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("phase", *shown, "all"):
        table.add_column(_HEADINGS.get(column, column), justify="left" if column == "phase" else "right", no_wrap=True)
    for phase in forecast.phases:
        cells = [f"{phase.kinds[kind] / size:.{digits}f}" if kind in phase.kinds else "" for kind in shown]
        table.add_row(phase.name, *cells, Text(f"{phase.bytes / size:.{digits}f}", style="bold"))
    return table


def _cell(estimate: Estimate | None, digits: int) -> Text:
    if estimate is None:
        return Text("")
    return Text(f"{number(estimate.value, digits)} [{number(estimate.low, digits)}, {number(estimate.high, digits)}]")
