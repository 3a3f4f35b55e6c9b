"""A search over the tiny Llama: what it works with, and its trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakeet.kinds.text.assemble import TextAssembly, assemble_text
from lorakeet.kinds.text.tuning.trials import SearchBudget, SearchRows, Trials
from lorakeet.runs.search_space import space_for
from tiny.runs import quiet, reviews, settings, write_rows

HOT = 1e6  # times the learning rate: one step leaves no number


def assembled(model: Path, folder: Path) -> TextAssembly:
    """60 rows, 18 of them held out, and 8 steps."""
    data = write_rows(folder / "rows.jsonl", reviews(60))
    changes = {"data.held_out_fraction": 0.3, "train.steps": 8, "train.learning_rate": 0.01}
    return assemble_text(settings(model, data, folder / "run", changes), quiet())


def trials_of(setup: TextAssembly, *, tokens: int | None = None, seconds: float | None = None) -> Trials:
    choices: dict[str, Any] = {"rank_choices": (2, 4), "target_choices": ("all-linear", "mlp")}
    space = space_for(setup.config, setup.text, rate_factors=(0.01, 100.0), **choices)
    examples = list(setup.held_out.examples)
    rows = SearchRows(examples[:9], examples[9:], {}, "other rows")
    return Trials(setup, space, rows, SearchBudget(seconds, tokens), quiet())
