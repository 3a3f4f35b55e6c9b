"""The report of a run: the measured sections of `judge` together with curves, leaks, memory, speed and circumstances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.data.leaks import LeakReport
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.report.rank_values import RankCell, RankCut, RankMap, Search
from lorakeet.evaluate.report.report import ChartPoint, Command, Curves, Drift, Leak, MemoryUse, Report
from lorakeet.kernels.cpu import operators
from lorakeet.memory.cuda import CONTEXT, bytes_beside_torch, gpu_peak_bytes
from lorakeet.memory.measure import peak_bytes
from lorakeet.models.files.origin import packed_folder
from lorakeet.ranks.allocate import pair_parameters
from lorakeet.train.loop import Outcome
from lorakeet.train.run import RunFolder
from lorakeet.workflows.finetuning.assemble_text import Assembly
from lorakeet.workflows.runs import facts


def complete(
    measured: Report,
    setup: Assembly,
    outcome: Outcome,
    *,
    run: RunFolder,
    metrics: Sequence[dict[str, Any]],
    certificate: Certificate,
    drift: Drift | None,
    rates: Search | None = None,
) -> Report:
    """`measured` with everything else that the page shows; `rates` is the trial that chose the learning rate."""
    part, _ = setup.judged
    return replace(
        measured,
        subtitle=f"{setup.text.name} on {Path(setup.config.data.train).name}, judged on {measured.rows_of} {part} rows",
        created=facts.now(),
        facts=_facts(setup, run),
        curves=curves(metrics, outcome),
        ranks=rank_map(setup.plan) if setup.begun is None else pruned_map(setup.begun, setup.plan, metrics),
        search=rates,
        leaks=leaks(setup.dataset.leaks),
        drift=drift,
        memory=_memory(setup, outcome),
        speed=speed(metrics, outcome),
        certificate=certificate,
        warnings=(*_warnings(setup), *measured.warnings),
        next_commands=_next(setup.config, run),
    )


def curves(metrics: Sequence[dict[str, Any]], outcome: Outcome) -> Curves:
    """The curves in metrics.jsonl."""
    steps = [record for record in metrics if record.get("loss") is not None]
    held_out = [record for record in metrics if record.get("held_out_loss") is not None]
    return Curves(
        train=tuple(ChartPoint(record["step"], record["loss"]) for record in steps),
        held_out=tuple(ChartPoint(r["step"], r["held_out_loss"], r["low"], r["high"]) for r in held_out),
        learning_rate=tuple(ChartPoint(record["step"], record["lr"]) for record in steps),
        best_step=outcome.best_step,
        ended=outcome.reason,
    )


def rank_map(plan: Plan) -> RankMap | None:
    """The ranks by block and matrix; None where all are the same."""
    cells = tuple(_cell(entry.path, entry.rank) for entry in plan.entries)
    return RankMap(cells) if len({cell.rank for cell in cells}) > 1 else None


def pruned_map(begun: Plan, left: Plan, metrics: Sequence[dict[str, Any]]) -> RankMap:
    """The ranks that pruning left of those with which training began, and the cuts in metrics.jsonl."""
    ranks = {entry.path: entry.rank for entry in left.entries}
    first = [entry.rank for entry in begun.entries]
    cuts = [RankCut(0, pair_parameters(begun), len(first), min(first), max(first))]
    cuts += [
        RankCut(r["step"], r["pair_parameters"], r["pairs"], r["lowest_rank"], r["highest_rank"]) for r in metrics if "pairs" in r
    ]
    return RankMap(tuple(_cell(entry.path, ranks.get(entry.path, 0)) for entry in begun.entries), tuple(cuts))


def _cell(path: str, rank: int) -> RankCell:
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    layer, matrix = ("", path) if number is None else (parts[number], ".".join(parts[number + 1 :]))
    return RankCell(layer, matrix, rank)


def leaks(found: LeakReport) -> tuple[Leak, ...]:
    """Each row that stood on both sides of a split, and what became of it."""
    dropped = {row.source for row in found.dropped}
    return tuple(
        Leak(
            held_out=pair.twin.source,
            train=pair.row.source,
            similarity=pair.similarity,
            action=f"dropped from {pair.row_part}" if pair.row.source in dropped else "kept",
            text=" ".join(pair.row.text.split())[:200],
        )
        for pair in found.across
    )


def _facts(setup: Assembly, run: RunFolder) -> dict[str, str]:
    data, model = setup.dataset, setup.config.model
    native = setup.text.device.type == "cpu" and setup.text.products == torch.bfloat16 and operators.in_use()
    about = f"{setup.text.name}, {model.dtype} weights, {model.products} products, {model.attention} attention"
    about += ", native kernels" if native else ""
    rows = {"Rows": f"{len(data.train)} training, {len(data.held_out)} held-out, {len(data.test)} test"}
    if setup.begun is not None:
        rows["Ranks"] = f"pruned in training by AdaLoRA's importance, from {setup.begun.summary()}"
    if (count := setup.processes.count) > 1:
        base = f"1/{count} of every frozen block" if setup.parted else "the whole base"
        rows["Processes"] = f"{count}, each with {base} and its part of the rows of a step"
    return run_facts(setup.config, setup.plan, run, setup.text.device, model=about, about=rows)


def run_facts(
    config: RunConfig, plan: Plan, run: RunFolder, device: torch.device, *, model: str, about: Mapping[str, str]
) -> dict[str, str]:
    """The circumstances of a run, in the order of the page; `about` is what only this kind of run has to say."""
    lora = config.lora
    return {
        "Model": model,
        "Adapter": f"{lora.variant}, rank {lora.rank}, alpha {lora.alpha:g} ({lora.scale_rule}), {plan.summary()}",
        **about,
        "Seeds": f"training {config.train.seed}, split {config.data.split_seed}, evaluation {config.evaluate.seed}",
        "Versions": facts.versions(),
        "Machine": facts.machine(device),
        "Run folder": str(run.path),
    }


def _memory(setup: Assembly, outcome: Outcome) -> tuple[MemoryUse, ...]:
    """Planned and used bytes: of training, then of all from loading up to the certificate; and the latter against a budget.

    Under a budget on a CUDA device they are the device's since training began, with the context as planned, and beside them what
    was not planned.
    """
    kept = setup.arrangement
    process = peak_bytes() if setup.memory is None else setup.memory.now()
    whole = process if kept.card is None else gpu_peak_bytes(kept.card)
    planned = None if kept.forecast is None else kept.forecast.peak
    place = "whole process" if kept.card is None else f"on {kept.card}"
    used = (
        MemoryUse(f"training, {place}", kept.planned, outcome.peak_bytes),
        MemoryUse(f"{'loading, ' if kept.card is None else ''}training, judging and certificate", planned, whole),
    )
    if kept.budget is None:
        return used
    what = "the whole run" if kept.card is None else "training and judging"
    against = (*used, MemoryUse(f"{what}, against memory.budget", kept.budget, whole))
    if kept.card is None:
        return against
    return (*against, *beside_a_card(kept.card))


def beside_a_card(card: torch.device) -> tuple[MemoryUse, ...]:
    """What was not planned, or is not torch's, where a budget bounds the memory of a CUDA device."""
    return (
        MemoryUse(f"CUDA context on {card}, and other processes there", CONTEXT, bytes_beside_torch(card)),
        MemoryUse("the process's own memory on the host", None, peak_bytes()),
    )


def speed(
    metrics: Sequence[dict[str, Any]], outcome: Outcome, *, unit: str = "Tokens", drawn: str = "", digits: int = 0
) -> dict[str, str]:
    """How long training took and how much it saw, counted in `unit`."""
    rates = sorted(record["tokens_per_second"] for record in metrics if record.get("tokens_per_second"))
    found = {
        "Training time": f"{outcome.seconds:.0f} s, held-out evaluations included",
        f"{unit} trained on": f"{outcome.tokens:,}{drawn}",
        "Steps": f"{outcome.steps} of {outcome.planned_steps} ({outcome.reason})",
        "Learning rate": f"{outcome.learning_rate:.2e} at its highest",
    }
    if outcome.loss_scale is not None:
        skipped = f"{outcome.skipped_steps} of {outcome.steps} steps overflowed float16 and were left out"
        found["Loss scale"] = f"{outcome.loss_scale:,g} at the end; {skipped}"
    if rates:
        found[f"{unit} a second"] = f"{rates[len(rates) // 2]:,.{digits}f} (median over steps)"
    return found


def _warnings(setup: Assembly) -> tuple[str, ...]:
    found = []
    for name, encoded in setup.encoded.items():
        longer = f"{name} rows were longer than {setup.config.data.max_tokens} tokens and"
        if encoded.truncated:
            found.append(f"{encoded.truncated} {longer} were shortened.")
        if encoded.dropped:
            found.append(f"{len(encoded.dropped)} {longer} left out.")
    if not setup.dataset.test:
        found.append("There are no test rows: the checkpoint was chosen on the same held-out rows that it is judged on.")
    return tuple(found)


def _next(config: RunConfig, run: RunFolder) -> tuple[Command, ...]:
    packed = config.model.quantize.method
    quantize = f" --quantize {packed}" if packed in ("nf4", "int8") else ""
    path, merged_path, ollama_path = (quote(f"{run.path}{ending}") for ending in ("", "-merged", "-ollama"))
    serving = f"lorakeet serve --model {quote(config.model.path)}{quantize} --adapter {quote(f'{run.path.name}={run.path}')}"
    merged: tuple[Command, ...] = (
        Command(f"lorakeet merge {path} --out {merged_path}", "fold the adapter into a model that transformers loads"),
        Command(f"lorakeet export {path} --to ollama --out {ollama_path}", "write it for Ollama, checked in llama.cpp"),
        Command(f"lorakeet verify {path}", "compare what these two wrote with the live adapter"),
    )
    if packed == "none" and (stored := packed_folder(Path(config.model.path).expanduser())):
        into = f"lorakeet merge {path} --into packed --out {merged_path}"
        merged = (Command(into, f"fold the adapter into a model that stays {stored}"),)
    return (
        *merged,
        Command(serving, "answer over HTTP, as OpenAI's API and Ollama's do"),
        Command(f"lorakeet evaluate {path} --data FILE", "measure it on rows of your own"),
    )
