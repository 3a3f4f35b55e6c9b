"""`--ranks auto`: measures what ranks are worth on training rows and turns the budget into an ordinary lora.rank_pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from lorakeet.config import RunConfig
from lorakeet.core.initialise import seed_for
from lorakeet.core.plan import Plan
from lorakeet.core.spec import MEASURED
from lorakeet.data.chat import Example
from lorakeet.data.pack import micro_batches
from lorakeet.errors import ConfigError, DataError
from lorakeet.memory.allocator import release_free_memory
from lorakeet.models.fuse import unfuse
from lorakeet.models.inject import activate, eject, trained_parameters
from lorakeet.models.modules import find, output_layer
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.model import TextModel
from lorakeet.planning.forecast_text_run import budget_of
from lorakeet.ranks import score as scoring
from lorakeet.ranks.allocate import Gains, allocate, pair_parameters, rank_pattern
from lorakeet.train.text.task import TextTask

NAME = "ranks"  # of the temporary pairs whose gradients are measured


def choose_ranks(
    config: RunConfig, text: TextModel, plan: Plan, examples: Sequence[Example], console: Console
) -> tuple[RunConfig, Plan]:
    """The settings with the chosen ranks in `lora.rank_pattern` and ranks.choose given, and the plan of them.

    So the saved run file names the ranks, which can be read, edited and resumed. Raises ConfigError for a budget that does not
    fit or a model that cannot be scored, and DataError for scores that are not finite.
    """
    spec = config.ranks
    budget = budget_of(config, plan)
    step = 2 if config.lora.start == "orthogonal" else 1
    gains = _gains(config, text, plan, examples)
    release_free_memory()  # scoring leaves freed memory that the run has no use for
    chosen = allocate(plan, gains, budget, largest=spec.max_rank, step=step)
    lora = replace(config.lora, rank_pattern=rank_pattern(chosen, config.lora))
    ranks = [entry.rank for entry in chosen.entries]
    used, rows, span = pair_parameters(chosen), min(spec.rows, len(examples)), f"ranks {min(ranks)} to {max(ranks)}"
    said = f"Ranks by {spec.score} on {rows} training rows: {used:,} of {budget:,} parameters, {span}."
    console.print(f"{said} The saved run file has them in lora.rank_pattern.", markup=False, soft_wrap=True)
    config = replace(config, lora=lora, ranks=replace(spec, choose="given", budget=None))
    return config, replace(plan_for(text.model, lora, text.family), frozen_parameters=plan.frozen_parameters)


def start_directions(config: RunConfig, text: TextModel, plan: Plan, examples: Sequence[Example]) -> dict[str, Tensor]:
    """The initial A of every pair if lora.start measures it (gradient, activation) on ranks.rows rows; else empty.

    A resumed run gets the same. Raises as `choose_ranks` does.
    """
    start = config.lora.start
    if start not in MEASURED:
        return {}
    rows = _rows(config, text, examples, f"lora.start {start}")
    ranks = {entry.path: entry.rank for entry in plan.entries}
    if start == "gradient":
        return scoring.gradient_directions(_halves(config, text, plan, rows, max(ranks.values())), ranks)
    return scoring.activation_directions(_sketches(config, text, plan, rows, "input", max(ranks.values())), ranks)


def _gains(config: RunConfig, text: TextModel, plan: Plan, examples: Sequence[Example]) -> Gains:
    score, largest = config.ranks.score, config.ranks.max_rank
    rows = _rows(config, text, examples, "ranks.choose auto")
    if score == "gradient":
        return scoring.gradient_gains(_halves(config, text, plan, rows, largest), largest=largest)
    of: Literal["input", "output"] = "input" if score == "activation" else "output"
    return scoring.variance_gains(_sketches(config, text, plan, rows, of, largest), plan, largest=largest)


def _rows(config: RunConfig, text: TextModel, examples: Sequence[Example], what: str) -> list[Example]:
    """The training rows to measure on. Raises ConfigError for a streamed model, and DataError for fewer than 2 rows."""
    if text.streamed is not None:
        raise ConfigError(
            f"{what} reads gradients or states of a model in memory, but memory.budget streams this one. Choose the ranks in a "
            "run without the budget (--dry-run --json prints them), then give them in lora.rank_pattern, with lora.start kaiming."
        )
    rows = sorted(examples, key=lambda example: seed_for(config.train.seed, f"ranks/{example.key}"))[: config.ranks.rows]
    if len(rows) < 2:
        raise DataError(
            f"{what} needs 2 training rows or more; there are {len(rows)}. Give ranks in lora.rank, with lora.start kaiming."
        )
    return rows


def _sketches(
    config: RunConfig, text: TextModel, plan: Plan, rows: Sequence[Example], of: Literal["input", "output"], largest: int
) -> dict[str, scoring.Sketch]:
    """Sketches of the base model's inputs or outputs of each matrix on the rows."""

    head, watched = output_layer(text.model), text.with_every_token()
    sketches_head = any(find(text.model, entry.path) is head for entry in plan.entries)

    def forward() -> None:
        for batch in micro_batches(rows, config.train.micro_tokens, padded=text.pads):
            states = watched.hidden(batch.to(text.device))
            for some in torch.split(states, config.train.head_chunk) if sketches_head else ():
                cast(nn.Module, head)(some)  # text.hidden does not call the head

    unfuse(text.model)  # every matrix is called by itself; initialise_adapter fuses again
    activate(text.model, None)
    text.model.eval()
    return scoring.sketch_states(text.model, plan, forward, of=of, largest=largest, seed=config.train.seed)


def _halves(config: RunConfig, text: TextModel, plan: Plan, rows: Sequence[Example], largest: int) -> scoring.Halves:
    """Gradients of temporary pairs on two halves of the rows; leaves the model as it was."""
    sketch = scoring.sketch_plan(plan, largest)
    with torch.random.fork_rng(devices=[]):
        adapted = initialise_adapter(text, sketch, seed=config.train.seed, name=NAME)
        try:
            task = TextTask(adapted, rows, held_out=(), spec=config.train, name=NAME)
            most, padded = config.train.micro_tokens, text.pads
            halves = [micro_batches(part, most, padded=padded) for part in (rows[::2], rows[1::2])]

            def backward(half: int) -> None:
                batches = [batch for batch in halves[half] if batch.targets]
                task.gradients(batches, max(1, sum(batch.targets for batch in batches)))

            return scoring.gradient_halves(sketch, trained_parameters(text.model, NAME), backward, seed=config.train.seed)
        finally:
            eject(text.model, NAME)
            text.model.eval()
