"""Completes the report of a run: the measured sections with curves, memory, speed and circumstances."""

from __future__ import annotations

import datetime
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lorakeet import __version__
from lorakeet.core.plan import Plan
from lorakeet.data.leaks import KINDS, PARTS, LeakReport
from lorakeet.errors import percent
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.report.charts import ChartPoint, Curves
from lorakeet.evaluate.report.rank_values import RankCell, RankCut, RankMap, Search
from lorakeet.evaluate.report.report import Leak, MemoryUse, Report
from lorakeet.evaluate.verdict import circumstances, noted
from lorakeet.evaluate.wording import duration_text
from lorakeet.kinds.protocol import Assembly, AssemblyT, RunKind
from lorakeet.kinds.trained_targets import target_rows, warnings_after
from lorakeet.memory.cuda import CONTEXT, bytes_beside_torch, gpu_peak_bytes
from lorakeet.memory.measure import peak_bytes
from lorakeet.ranks.allocate import pair_parameters
from lorakeet.train.log import read_metrics
from lorakeet.train.loop import Outcome
from lorakeet.train.progress import TEXT
from lorakeet.train.run import RunFolder

_WITH_TEXTS = 20  # leaks of each kind whose texts are in the report


@dataclass(frozen=True)
class PhaseTimes:
    """The seconds of each phase of a run. Loading the model and a trial of learning rates are in none of them."""

    training: float  # with the held-out evaluations between steps
    evaluation: float
    certificate: float

    def texts(self) -> dict[str, str]:
        """Each phase with its time and its share of all three: "75 s, 43 % of the run"."""
        phases = {field.name: getattr(self, field.name) for field in fields(self)}
        run = sum(phases.values())
        return {name: f"{duration_text(seconds)}, {percent(seconds / run, 0)} of the run" for name, seconds in phases.items()}


def complete(
    measured: Report,
    kind: RunKind[AssemblyT],
    setup: AssemblyT,
    outcome: Outcome,
    *,
    run: RunFolder,
    certificate: Certificate,
    times: PhaseTimes,
    search: Search | None = None,
) -> Report:
    """`measured` with everything else that the page shows; `search` is the trial that chose the learning rate."""
    config, lora, (part, rows) = setup.config, setup.config.lora, setup.evaluated
    metrics = read_metrics(run.metrics)
    count = measured.rows_of or len(rows)
    moved = () if setup.moved is None else tuple(warnings_after(setup.plan, setup.moved))
    return replace(
        measured,
        verdict=noted(measured.verdict, circumstances(part)),
        targets=target_rows(setup.plan, setup.moved),
        warnings=(*measured.warnings, *setup.remarks, *moved),
        subtitle=f"{setup.name} on {Path(setup.config.data.train).name}, evaluated on {count} {part} {kind.words.evaluated}",
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        facts={
            "Model": kind.model_text(setup),
            "Adapter": f"{lora.variant}, rank {lora.rank}, alpha {lora.alpha:g} ({lora.scale_rule}), {setup.plan.summary()}",
            **kind.facts(setup),
            "Training": training_text(setup, outcome, kind.words.evaluated),
            "Seeds": f"training {config.train.seed}, split {config.data.split_seed}, evaluation {config.evaluate.seed}",
            "Versions": versions(),
            "Machine": machine(setup.device),
            "Run folder": str(run.path),
        },
        curves=curves(metrics, outcome),
        ranks=kind.rank_map(setup, metrics),
        search=search,
        memory=memory_use(setup, outcome),
        speed=_speed(metrics, outcome, kind.words.computed, times),
        certificate=certificate,
        next_commands=kind.next_commands(setup, run),
    )


def training_text(setup: Assembly, outcome: Outcome, rows: str) -> str:
    """The learning rate, the steps and their size; which step's adapter it is, where that is not the last."""
    train = setup.config.train
    rates = f", of B {train.b_learning_rate_ratio:g} times that" if train.b_learning_rate_ratio != 1 else ""
    best = outcome.best_step
    kept = "" if best is None or best == outcome.steps else f"; the adapter is that of step {best:,}"
    done = f"{outcome.steps:,} steps of {train.batch_size} {rows}{kept}"
    return f"learning rate {outcome.learning_rate:g}{rates} ({train.schedule}), {done}"


def curves(metrics: Sequence[dict[str, Any]], outcome: Outcome) -> Curves:
    """The curves in metrics.jsonl."""
    steps = [record for record in metrics if record.get("loss") is not None]
    held_out = [record for record in metrics if record.get("held_out_loss") is not None]
    return Curves(
        train=tuple(ChartPoint(record["step"], record["loss"]) for record in steps),
        held_out=tuple(ChartPoint(r["step"], r["held_out_loss"], r["low"], r["high"]) for r in held_out),
        learning_rate=tuple(ChartPoint(record["step"], record["lr"]) for record in steps),
        preferred=tuple(ChartPoint(record["step"], record["preferred"]) for record in held_out if "preferred" in record),
        best_step=outcome.best_step,
        ended=outcome.reason,
    )


def rank_map(plan: Plan) -> RankMap | None:
    """The ranks by block and matrix; None where all are the same."""
    cells = tuple(_cell(entry.path, entry.rank) for entry in plan.entries)
    return RankMap(cells) if len({cell.rank for cell in cells}) > 1 else None


def pruned_map(initial: Plan, left: Plan, metrics: Sequence[dict[str, Any]]) -> RankMap:
    """The ranks that pruning left of those of the `initial` plan, and the cuts in metrics.jsonl."""
    ranks = {entry.path: entry.rank for entry in left.entries}
    first = [entry.rank for entry in initial.entries]
    cuts = [RankCut(0, pair_parameters(initial), len(first), min(first), max(first))]
    cuts += [
        RankCut(r["step"], r["pair_parameters"], r["pairs"], r["lowest_rank"], r["highest_rank"]) for r in metrics if "pairs" in r
    ]
    return RankMap(tuple(_cell(entry.path, ranks.get(entry.path, 0)) for entry in initial.entries), tuple(cuts))


def _cell(path: str, rank: int) -> RankCell:
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    layer, matrix = ("", path) if number is None else (parts[number], ".".join(parts[number + 1 :]))
    return RankCell(layer, matrix, rank)


def leaks(found: LeakReport) -> tuple[Leak, ...]:
    """Each row that was in two parts of the data, and what was done about it; the first ones of each kind with both texts."""
    dropped = {row.source for row in found.dropped}
    shown: Counter[str] = Counter()
    listed = []
    for pair in found.across:
        shown[pair.kind] += 1
        text, twin_text = pair.excerpts() if shown[pair.kind] <= _WITH_TEXTS else ("", "")
        action = f"dropped from {pair.row_part}" if pair.row.source in dropped else "kept"
        evaluated, other = pair.twin.source, pair.row.source
        if PARTS.index(pair.row_part) < PARTS.index(pair.twin_part):  # `lorakeet evaluate` drops evaluated rows
            evaluated, other = other, evaluated
        listed.append(Leak(evaluated, other, pair.similarity, action, text, KINDS[pair.kind], twin_text))
    return tuple(listed)


def memory_use(setup: Assembly, outcome: Outcome) -> tuple[MemoryUse, ...]:
    """Planned and used bytes: of training, of the whole run, and of the run against its budget.

    They are the process's; with a budget on a CUDA device they are the device's since training started, with the context as
    planned, and what was not planned follows.
    """
    budget, device = setup.residency.budget, setup.residency.gpu
    process = peak_bytes() if setup.memory is None else setup.memory.now()
    whole = process if device is None else gpu_peak_bytes(device)
    plan = setup.residency.plan
    training, planned = (None, None) if plan is None else (plan.training_peak, plan.peak)
    what = "loading, training, evaluation and certificate" if device is None else "training, evaluation and certificate"
    used = [
        MemoryUse(f"training, {'whole process' if device is None else f'on {device}'}", training, outcome.peak_bytes),
        MemoryUse(what, planned, whole),
    ]
    if budget:
        what = "the whole run" if device is None else "training and evaluation"
        bound = "what was free" if budget.free else "memory.budget"
        used.append(MemoryUse(f"{what}, against {bound}", budget.limit, whole))
    if budget and device is not None:
        used.append(MemoryUse(f"CUDA context on {device}, and other processes there", CONTEXT, bytes_beside_torch(device)))
        used.append(MemoryUse("the process's own memory on the host", None, peak_bytes()))
    return tuple(used)


def _speed(metrics: Sequence[dict[str, Any]], outcome: Outcome, computed: str, times: PhaseTimes) -> dict[str, str]:
    """How long each phase took and how much training saw: `computed` is "tokens", or else what a row of it is called."""
    rates = sorted(record["tokens_per_second"] for record in metrics if record.get("tokens_per_second"))
    unit, repeated, digits = computed.capitalize(), "", 0
    if computed != TEXT.computed:
        repeated, digits = ", each as often as it was drawn", 2
    took = times.texts()
    found = {
        "Training time": f"{took['training']}, held-out evaluations included",
        "Evaluation time": took["evaluation"],
        "Certificate time": took["certificate"],
        f"{unit} trained on": f"{outcome.tokens:,}{repeated}",
        "Steps": f"{outcome.steps} of {outcome.planned_steps} ({outcome.reason})",
        "Learning rate": f"{outcome.learning_rate:.2e} at its highest",
    }
    if outcome.loss_scale is not None:
        skipped = f"{outcome.skipped_steps} of {outcome.steps} steps overflowed float16 and were left out"
        found["Loss scale"] = f"{outcome.loss_scale:,g} at the end; {skipped}"
    if rates:
        found[f"{unit} a second"] = f"{rates[len(rates) // 2]:,.{digits}f} (median over steps)"
    return found


PACKAGES = ("torch", "transformers", "diffusers", "safetensors", "numpy", "scipy")


def versions(packages: Sequence[str] = PACKAGES) -> str:
    """lorakeet's own version, Python's and those of the installed `packages`, by default of those that decide numbers."""
    found = [f"lorakeet {__version__}", f"Python {platform.python_version()}"]
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def machine(device: torch.device) -> str:
    """The processor or GPU, and how many threads of it torch uses."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {platform.system()}"
    return f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads, {platform.system()} {platform.machine()}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "CPU"
