"""Prints the rows, the plan and the memory of a run on text before it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lorakeet.data.chat import show_example
from lorakeet.data.template import uses_template
from lorakeet.errors import percent
from lorakeet.evaluate.wording import bytes_text
from lorakeet.kinds.terminal import show_counts, show_plan, show_targets
from lorakeet.ranks.allocate import pair_parameters
from lorakeet.runs.remarks import remarks_on

if TYPE_CHECKING:
    from lorakeet.kinds.text.assemble import TextAssembly

SHOWN_LABELS = 20


def show_rows(setup: TextAssembly, console: Console) -> None:
    """Prints the rows, the leaks, one example with its target tokens in colour, the plan, and the memory that is planned."""
    show_counts("Rows", setup.dataset, console)
    if counts := setup.dataset.label_counts:
        shown = sorted(counts.items(), key=lambda item: -item[1])
        more = f" and {len(shown) - SHOWN_LABELS} more labels" if len(shown) > SHOWN_LABELS else ""
        listed = ", ".join(f"{label} {count:,}" for label, count in shown[:SHOWN_LABELS])
        console.print(Text(f"Labels of the training rows: {listed}{more}"))
    data = setup.config.data
    few_shot = setup.config.evaluate.examples > 0
    remarks = [remark.words for remark in remarks_on(setup.dataset, data, few_shot=few_shot)]
    for line in (*setup.dataset.notes, *remarks, *setup.dataset.leaks.lines()):
        console.print(Text(line))
    for name, encoded in setup.encoded.items():
        if encoded.truncated or encoded.dropped:
            limit = f"{setup.config.data.max_tokens} tokens"
            console.print(f"{encoded.truncated} {name} rows shortened to {limit}, {len(encoded.dropped)} left out")
    first = setup.dataset.train[0].turns[0]
    if data.chat_template == "auto" and first.role and not uses_template(setup.text.tokenizer, data):
        console.print("The tokenizer has no chat template, so turns are joined as raw text.", soft_wrap=True)
    for title, example in zip(setup.config.train.registered.titles, setup.train.examples, strict=False):
        console.print(Text.assemble((title, "bold"), " (target tokens in green):"))
        console.print(show_example(example, setup.text.tokenizer))
    show_plan(("path", "weight"), setup.plan.rows(), setup.plan, console)
    show_targets(setup.plan, setup.remarks, console)
    if cuts := setup.cuts:
        steps = ", ".join(f"{budget:,} after step {step}" for step, budget in cuts.items())
        console.print(
            f"Ranks are pruned from {pair_parameters(setup.plan):,} parameters: at most {steps}. Only then may an adapter be the "
            "best one: a run that ends before leaves its checkpoints, and no adapter.",
            soft_wrap=True,
        )
    model, targets = setup.config.model, sum(int(example.supervised.sum()) for example in setup.train.examples)
    console.print(
        f"{setup.steps} steps of {setup.config.train.batch_size} rows, {setup.tokens_per_epoch:,} tokens an epoch, "
        f"{percent(targets / setup.tokens_per_epoch)} of them targets; "
        f"{model.dtype} weights, {model.products} products, {model.attention} attention on {model.device}"
    )
    planned = setup.residency.plan
    if planned is not None:
        where = "of this process" if setup.residency.gpu is None else f"on {setup.residency.gpu}"
        console.print(f"Memory: at most {bytes_text(planned.peak)} {where} planned, in the phase: {planned.highest.name}")
