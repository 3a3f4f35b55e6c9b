"""`lorakeet plan`: how much memory and time a run will take, phase by phase, before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.kinds.protocol import NO_BOUND, PlanResult, run_kind
from lorakeet.planning.machines import on_machine
from lorakeet.verbs import finetune as _run  # noqa: F401 - so that what a run has in memory is counted
from lorakeet.verbs.options import PlanOptions


def plan(
    config: RunConfig,
    options: PlanOptions = PlanOptions(),
    *,
    console: Console,
    watch: Callable[[PlanResult], None] | None = None,
) -> PlanResult:
    """Plans the run of `config` from the model's configuration, without weights, and prints the plan.

    Rows that data.train names are read for their lengths, unless `options.tokens` is their length. `options` override the
    settings in `config`. If the run would take more than memory.budget, or than is free on `options.machine`, the result says
    what would help. `watch` gets the forecast with all weights in memory before that is searched. Raises ConfigError for an
    unknown model, DataError for rows that cannot be used.
    """
    if options.rank is not None:
        config = config.changed(lora={"rank": options.rank})
    if (tokens := options.tokens) is not None:
        config = config.changed(data={"max_tokens": tokens}, train={"micro_tokens": tokens})
        config = run_kind(config).without_rows(config)
    if options.quantize is not None:
        config = config.changed(model={"quantize": dataclasses.replace(config.model.quantize, method=options.quantize)})
    free = NO_BOUND
    if options.machine is not None:
        config, free = on_machine(config, options.machine)
    return run_kind(config).plan(config, console, free, watch)
