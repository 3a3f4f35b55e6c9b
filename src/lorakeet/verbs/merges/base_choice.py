"""Into which base a quantised run's adapter is merged: both are measured on the held-out rows, and the better one is taken."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from rich.console import Console

from lorakeet.data.chat import Encoder
from lorakeet.data.prepare import Dataset
from lorakeet.errors import ConfigError
from lorakeet.evaluate.answers import Answers
from lorakeet.evaluate.compare import Comparison, Scores, compare_answers, compare_scores, measure_scores
from lorakeet.evaluate.report.report import Report, SystemResult
from lorakeet.evaluate.values import encode
from lorakeet.kinds.terminal import show_results
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.kinds.text.reply import ADAPTER
from lorakeet.models.files.origin import origin_of, packed_folder, stored_as
from lorakeet.models.files.source import on_this_machine
from lorakeet.planning.evaluation import fit_evaluation
from lorakeet.planning.forecast_text_run import Workload
from lorakeet.runs.open_adapter import NAME, Opened
from lorakeet.runs.residency import stream_closed

Base = Literal["original", "dequantised"]
Into = Literal["original", "dequantised", "auto"]
BASES: tuple[Base, ...] = ("original", "dequantised")
AT_LOAD = ("nf4", "int8")  # ways of packing a dense model as it is loaded


@dataclass(frozen=True)
class BaseChoice:
    """The base that is merged into, why, and the comparison that decided; the first comparison's metric did."""

    base: Base
    why: str = ""
    systems: tuple[SystemResult, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return dict(encode(self))


@dataclass(frozen=True)
class Bases:
    """The base of an adapter as it was before it was quantised, and as the adapter was trained on it."""

    kind: str  # nf4, int8, gptq, gguf; empty where the base was not quantised
    original: Opened | None  # None where it is not known, or not here
    dequantised: Opened | None  # None where the base was not quantised
    named: str = ""  # what the quantised base's own record calls the original, where that is not on this machine

    def of(self, base: Base) -> Opened:
        """The one that was chosen."""
        found = self.original if base == "original" else self.dequantised
        assert found is not None
        return found


def both_bases(opened: Opened) -> Bases:
    """Both bases. Of one that is quantised on disk, the original is what --base names, or else what its own record says."""
    kind, trained, given = opened.trained_on, opened.trained_model, opened.config.model
    dense = opened.dense_spec
    if not kind:
        return Bases("", opened, None)
    if trained.quantize.method in AT_LOAD:
        return Bases(kind, opened.over(dense), opened)
    if given.path != trained.path and stored_as(given) != kind:
        return Bases(kind, opened.over(dense), opened.over(trained))
    packed = opened.over(replace(trained, path=given.path))
    origin = replace(dense, path=origin_of(given), revision=None)
    place = on_this_machine(origin) if origin.path else None
    if place is None or packed_folder(place):
        return Bases(kind, None, packed, origin.path)
    return Bases(kind, opened.over(origin), packed)


def choose_base(into: Into, opened: Sequence[Opened], bases: Bases, dataset: Dataset | None, console: Console) -> BaseChoice:
    """Resolves `into` for these adapters; `bases` are those of the first. "auto" measures one run that has both.

    Raises ConfigError if the requested base does not exist or is not known.
    """
    first = opened[0]
    if not bases.kind and into == "dequantised":
        raise ConfigError(
            f"--into dequantised: the base of {first.folder} was not quantised, so there is only one to merge into. "
            "Leave --into out."
        )
    if not bases.kind:
        return BaseChoice("original", _unseen(first))
    if bases.original is None and into == "original":
        raise ConfigError(f"--into original: {_no_original(first, bases)}. Name it with --base, or leave --into out.")
    if bases.original is None or into == "dequantised":
        alone = (
            f" {_no_original(first, bases)}, so the two bases were not compared; name it with --base for that."
            if into == "auto"
            else ""
        )
        why = f"Merged into the weights that {bases.kind} stands for, on which the run was trained."
        return BaseChoice("dequantised", why + alone)
    if into == "original":
        return BaseChoice("original", _trained_elsewhere(bases))
    if len(opened) > 1 or dataset is None:
        lacking = "Several adapters have no held-out rows in common" if len(opened) > 1 else "A bare adapter has no held-out rows"
        why = f"{lacking}, so the original base is taken unmeasured. {_trained_elsewhere(bases)}"
        return BaseChoice("original", why)
    return _measured(bases, dataset, console)


def _no_original(opened: Opened, bases: Bases) -> str:
    named = f" (its own record names {bases.named}, which is not on this machine)" if bases.named else ""
    return f"No unquantised original of {opened.config.model.path} is known{named}"


def _unseen(opened: Opened) -> str:
    """What is said of a run whose base is not here, while --base names another place; else nothing."""
    trained = opened.trained_model
    if opened.run is None or trained.path == opened.config.model.path or on_this_machine(trained) is not None:
        return ""
    return (
        f"The base that {opened.run.path} was trained on, {trained.path}, is not on this machine, so it cannot be seen whether "
        f"its weights were quantised; merged into {opened.config.model.path}, unmeasured."
    )


def _trained_elsewhere(bases: Bases) -> str:
    return (
        f"The adapter was trained on a base in {bases.kind} and is folded into the unquantised weights: the merged "
        "model is not exactly the one that the run measured, and its own scores may differ a little."
    )


def _measured(bases: Bases, dataset: Dataset, console: Console) -> BaseChoice:
    """Base + adapter on the held-out rows, over the original weights and over the quantised ones, which are the dequantised."""
    found = {name: _scores(bases.of(name), dataset, name, console) for name in BASES}
    gc.collect()  # … and before those that are merged and checked
    spec = bases.of("original").config.evaluate
    original, dequantised = found["original"], found["dequantised"]
    if isinstance(original, Answers) and isinstance(dequantised, Answers):
        comparisons = compare_answers(dequantised, original, spec)
    else:
        comparisons = compare_scores(dequantised, original, spec)
    deciding = next(item for item in comparisons if item.metric in ("log_loss", "loss"))
    metrics = {name: measure_scores(scores, spec) for name, scores in found.items()}
    best: Base = "dequantised" if deciding.difference.value < 0 else "original"
    systems = tuple(SystemResult(name, "adapter" if name == best else "base", values) for name, values in metrics.items())
    task: Literal["classification", "language"] = "classification" if deciding.metric == "log_loss" else "language"
    title = f"The adapter over the original and over the dequantised ({bases.kind}) base"
    show_results(Report(title, task, f"{title}, held-out rows", systems=systems, comparisons=comparisons), console)
    shown = "shown" if deciding.verdict != "no difference shown" else "not shown to be more than chance"
    gap, metric = abs(deciding.difference.value), deciding.metric.replace("_", "-")
    why = (
        f"Merged into the {best} base: on {deciding.difference.n} held-out rows its {metric} is {gap:.4f} lower than the other's "
        f"({shown})."
    )
    return BaseChoice(best, why, systems, (deciding, *(item for item in comparisons if item is not deciding)))


def _scores(opened: Opened, dataset: Dataset, base: str, console: Console) -> Scores:
    console.print(f"Measuring the adapter over the {base} base")
    gc.collect()  # a model before this one, whose parts know each other
    workload = Workload(bool(dataset.labels), sum(len(row.text) for row in dataset.held_out))
    residency = fit_evaluation(opened.config, opened.adapter, partial(console.print, markup=False, soft_wrap=True), workload)
    text = replace(opened, residency=residency).text_model(console)
    encoder = Encoder(text.tokenizer, opened.config.data, dataset.labels)
    evaluator = TextEvaluator(opened.config, text, encoder, dataset.held_out, console, NAME)
    with stream_closed(text):
        return replace(evaluator.scores(evaluator.fitting(), ADAPTER), system=base)
