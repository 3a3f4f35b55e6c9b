"""`lorakeet plan`: how much memory and time a run will take, phase by phase, before anything is loaded."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.workflows import finetune as _run  # noqa: F401 - so that what a run has in memory is counted
from lorakeet.workflows.finetuning.kind import PlanResult, run_kind
from lorakeet.workflows.options import PlanOptions


def plan(config: RunConfig, options: PlanOptions = PlanOptions(), *, console: Console) -> PlanResult:
    """Plans the run of `config` from the model's configuration, without weights or rows, and prints the plan.

    `options` override the settings in `config`. If the run would take more than memory.budget, the result says what would help.
    Raises ConfigError for an unknown model.
    """
    config = _with(config, options)
    return run_kind(config).plan(config, console)


def _with(config: RunConfig, options: PlanOptions) -> RunConfig:
    """Returns `config` with the settings that `options` override."""
    lora, data, train, model = config.lora, config.data, config.train, config.model
    if options.rank is not None:
        lora = dataclasses.replace(lora, rank=options.rank)
    if (tokens := options.tokens) is not None:
        data, train = dataclasses.replace(data, max_tokens=tokens), dataclasses.replace(train, micro_tokens=tokens)
    if options.quantize is not None:
        model = dataclasses.replace(model, quantize=dataclasses.replace(model.quantize, method=options.quantize))
    return dataclasses.replace(config, lora=lora, data=data, train=train, model=model)
