"""Into which base a quantised run's adapter is merged: both are measured on the held-out rows, and the better one is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich.console import Console

from lorakeet.data.chat import Encoder
from lorakeet.data.prepare import Dataset
from lorakeet.errors import ConfigError
from lorakeet.evaluate.answers import Answers, measure
from lorakeet.evaluate.compare import Comparison, compare_answers, compare_losses
from lorakeet.evaluate.likelihood import RowLosses, measure_losses
from lorakeet.evaluate.report import Report, SystemResult
from lorakeet.evaluate.values import encode
from lorakeet.workflows.judge import ADAPTER, Judge
from lorakeet.workflows.opened import NAME, Opened
from lorakeet.workflows.show import show_results

Base = Literal["original", "dequantised"]
Into = Literal["original", "dequantised", "auto"]


@dataclass(frozen=True)
class Choice:
    """The base that is merged into, why, and the comparison that decided; the first comparison's metric did."""

    base: Base
    why: str = ""
    systems: tuple[SystemResult, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        found: dict[str, Any] = encode(self)
        return found


def choose_base(into: Into, opened: Sequence[Opened], dataset: Dataset | None, console: Console) -> Choice:
    """What `into` comes to for these adapters. "auto" measures where there is one run on a base that was quantised at load.

    Raises ConfigError where the dequantised base is asked for and there is none.
    """
    first = opened[0]
    if first.trained_on == "gguf" and first.config.model.quantize.method == "gguf":
        return Choice("original", "Merged into the numbers that the .gguf file stands for, on which the run was trained.")
    packed = first.config.model.quantize.method in ("nf4", "int8")
    if not first.trained_on or not packed:
        if into == "dequantised":
            was = f"in {first.trained_on} on disk" if first.trained_on else "not quantised"
            raise ConfigError(
                f"--into dequantised: the base of {first.folder} was {was}; only a run with model.quantize.method nf4 or int8 "
                "has a dequantised base to merge into. Leave --into out, or name the dense model with --base."
            )
        return Choice("original", _trained_elsewhere(first) if first.trained_on else "")
    if into == "original":
        return Choice("original", _trained_elsewhere(first))
    if into == "dequantised":
        return Choice("dequantised", f"Merged into the weights that {first.trained_on} stands for, on which the run was trained.")
    if len(opened) > 1 or dataset is None:
        return Choice("original", "Several adapters have no held-out rows in common, so the original base is taken unmeasured.")
    return _measured(first, dataset, console)


def _trained_elsewhere(opened: Opened) -> str:
    return (
        f"The adapter was trained on a base in {opened.trained_on} and is folded into the unquantised weights: the merged "
        "model is not exactly the one that the run measured, and its own scores may differ a little."
    )


def _measured(opened: Opened, dataset: Dataset, console: Console) -> Choice:
    """Base + adapter on the held-out rows, over the original weights and over the quantised ones, which are the dequantised."""
    found = {base: _scores(opened, dataset, base, console) for base in ("original", "dequantised")}
    spec = opened.config.evaluate
    original, dequantised = found["original"], found["dequantised"]
    comparisons: tuple[Comparison, ...]
    if isinstance(original, Answers) and isinstance(dequantised, Answers):
        comparisons = compare_answers(dequantised, original, spec)
        deciding = next(item for item in comparisons if item.metric == "log_loss")
        metrics = {"original": measure(original, spec), "dequantised": measure(dequantised, spec)}
    else:
        assert isinstance(original, RowLosses) and isinstance(dequantised, RowLosses)
        deciding = compare_losses(dequantised, original, spec)
        comparisons = (deciding,)
        metrics = {"original": measure_losses(original, spec), "dequantised": measure_losses(dequantised, spec)}
    best: Base = "dequantised" if deciding.difference.value < 0 else "original"
    systems = tuple(SystemResult(name, "adapter" if name == best else "base", values) for name, values in metrics.items())
    task: Literal["classification", "language"] = "classification" if deciding.metric == "log_loss" else "language"
    title = f"The adapter over the original and over the dequantised ({opened.trained_on}) base"
    show_results(Report(title, task, f"{title}, held-out rows", systems=systems, comparisons=comparisons), console)
    shown = "shown" if deciding.verdict != "no difference shown" else "not shown to be more than chance"
    gap, metric = abs(deciding.difference.value), deciding.metric.replace("_", "-")
    why = (
        f"Merged into the {best} base: on {deciding.difference.n} held-out rows its {metric} is {gap:.4f} lower than the other's "
        f"({shown})."
    )
    return Choice(best, why, systems, (deciding, *(item for item in comparisons if item is not deciding)))


def _scores(opened: Opened, dataset: Dataset, base: str, console: Console) -> Answers | RowLosses:
    console.print(f"Measuring the adapter over the {base} base")
    text = opened.text_model(console, dense=base == "original")
    encoder = Encoder(text.tokenizer, opened.config.data, dataset.labels)
    judge = Judge(opened.config, text, encoder, dataset.held_out, console, NAME)
    rows = judge.fitting()
    return replace(judge.answers(rows, ADAPTER) if dataset.labels else judge.losses(rows, ADAPTER), system=base)
