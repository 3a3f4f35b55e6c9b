"""`--ranks auto`: what ranks are worth is measured on training rows, and the budget becomes an ordinary lora.rank_pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.core.start import seed_for
from lorakeet.data.chat import Example
from lorakeet.data.pack import micro_batches
from lorakeet.errors import ConfigError, DataError
from lorakeet.models.adapt import begin_adapter
from lorakeet.models.inject import eject, trained_parameters
from lorakeet.models.targets import plan_for
from lorakeet.models.text import TextModel
from lorakeet.ranks.allocate import Gains, allocate, pair_parameters, rank_pattern
from lorakeet.ranks.score import gradient_gains, sketch_plan, variance_gains
from lorakeet.ranks.spec import parameter_count
from lorakeet.train.text_task import TextTask

NAME = "ranks"  # of the pairs that gradients are read from, while they are


def choose_ranks(
    config: RunConfig, text: TextModel, plan: Plan, examples: Sequence[Example], console: Console
) -> tuple[RunConfig, Plan]:
    """The settings with the chosen ranks in `lora.rank_pattern` and ranks.choose given, and the Plan that they mean.

    So the saved run file says the ranks themselves: they can be read, edited and resumed. Raises ConfigError for a budget that
    does not fit or a model that cannot be scored, DataError for scores that are no numbers.
    """
    spec = config.ranks
    budget = pair_parameters(plan) if spec.budget is None else parameter_count(spec.budget, "ranks.budget")
    step = 2 if config.lora.start == "orthogonal" else 1
    gains = _gains(config, text, plan, examples)
    chosen = allocate(plan, gains, budget, largest=spec.max_rank, step=step)
    lora = replace(config.lora, rank_pattern=rank_pattern(chosen, config.lora))
    ranks = [entry.rank for entry in chosen.entries]
    used = pair_parameters(chosen)
    console.print(
        f"Ranks by {spec.score} on {min(spec.rows, len(examples))} training rows: {used:,} of {budget:,} parameters, ranks "
        f"{min(ranks)} to {max(ranks)}. They stand in lora.rank_pattern of the saved run file.",
        markup=False,
        soft_wrap=True,
    )
    config = replace(config, lora=lora, ranks=replace(spec, choose="given", budget=None))
    return config, replace(plan_for(text.model, lora, text.family), frozen_parameters=plan.frozen_parameters)


def _gains(config: RunConfig, text: TextModel, plan: Plan, examples: Sequence[Example]) -> Gains:
    spec = config.ranks
    if text.streamed is not None:
        raise ConfigError(
            "ranks.choose auto reads gradients of a model in memory, but memory.budget streams this one. Choose the ranks in a "
            "run without the budget (--dry-run --json prints them), then give them in lora.rank_pattern."
        )
    rows = sorted(examples, key=lambda example: seed_for(config.train.seed, f"ranks/{example.key}"))[: spec.rows]
    if len(rows) < 2:
        raise DataError(f"ranks.choose auto needs 2 training rows or more; there are {len(rows)}. Give ranks in lora.rank.")
    if spec.score == "gradient":
        return _by_gradient(config, text, plan, rows)

    def forward() -> None:
        for batch in micro_batches(rows, config.train.micro_tokens):
            text.hidden(batch.to(text.device))

    of, seed = "input" if spec.score == "activation" else "output", config.train.seed
    text.model.eval()
    return variance_gains(text.model, plan, forward, of=of, largest=spec.max_rank, seed=seed)  # type: ignore[arg-type]


def _by_gradient(config: RunConfig, text: TextModel, plan: Plan, rows: Sequence[Example]) -> Gains:
    """Training's own backward pass over temporary pairs; the model is as before afterwards."""
    sketch = sketch_plan(plan, config.ranks.max_rank)
    with torch.random.fork_rng(devices=[]):
        begin_adapter(text, sketch, seed=config.train.seed, name=NAME)
        try:
            task = TextTask(text, rows, held_out=(), spec=config.train, name=NAME)
            halves = [micro_batches(part, config.train.micro_tokens) for part in (rows[::2], rows[1::2])]

            def backward(half: int) -> None:
                batches = [batch for batch in halves[half] if batch.targets]
                task.gradients(batches, max(1, sum(batch.targets for batch in batches)))

            parameters = trained_parameters(text.model, NAME)
            return gradient_gains(
                sketch, parameters, backward, largest=config.ranks.max_rank, seed=config.train.seed
            )
        finally:
            eject(text.model, NAME)
            text.model.eval()
