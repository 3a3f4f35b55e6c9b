"""What merging and exporting a run's adapter will hold under its budget: the models of the check whole in memory, or streamed.

A run under a budget merges and exports under it too (workflows/forecast_check); a plan says beforehand what these take, from the
same sizes of the same checks, before there is an adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.errors import ConfigError
from lorakeet.export.llama_cpp import context_bytes
from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.merge.fold import FP32_COPIES
from lorakeet.models.quantized import plain_config
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.rehearsal import Judging, NotPlanned, Rows
from lorakeet.workflows.compare_artefact import GREEDY_TOKENS
from lorakeet.workflows.forecast_check import ALONE, FP32, CheckPlanner, CheckSize, adapted_bytes, tensor_bytes
from lorakeet.workflows.forecast_run import EXPORT, MERGE
from lorakeet.workflows.merge import size_of_merge
from lorakeet.workflows.verify import MARGIN


def later_phases(config: RunConfig, model_config: Any, plan: Plan, budget: int) -> tuple[Phase, ...]:
    """Merging and exporting an adapter of `plan` as they keep `budget`, or at the least that they take where they cannot.

    Empty for a model whose arithmetic cannot be followed on shapes.
    """
    dense = plain_config(model_config)
    text = dense.get_text_config()
    try:
        return tuple(_phase(name, size, config, dense, plan, budget) for name, size in _sizes(config, text, plan))
    except NotPlanned:
        return ()


def with_later(forecast: Forecast, later: tuple[Phase, ...]) -> Forecast:
    """`forecast` with these phases in place of those of the same name."""
    names = {phase.name for phase in later}
    return Forecast((*(phase for phase in forecast.phases if phase.name not in names), *later))


def _sizes(config: RunConfig, text: Any, plan: Plan) -> tuple[tuple[str, CheckSize], ...]:
    """What each check holds at once. Tensors are taken to be stored in the widest dtype that they may have."""
    length, table = config.data.max_tokens, int(text.vocab_size) * int(text.hidden_size)
    exported = length + GREEDY_TOKENS
    changed = adapted_bytes(plan, table)
    export = CheckSize(
        "the check of an export", Judging(Rows(exported), 1, exported), models=1, alternate=True, row=exported, tensors=True,
        beside=context_bytes(text, exported + MARGIN), writing=tensor_bytes(changed, table),
    )  # fmt: skip
    merge = size_of_merge(length, max((1 + FP32_COPIES) * changed, 2 * FP32 * table))
    return (MERGE, merge), (EXPORT, export)


def _phase(name: str, size: CheckSize, config: RunConfig, model_config: Any, plan: Plan, budget: int) -> Phase:
    """At its peak with all weights in memory where that fits, else with two blocks of each model, or with one."""
    dense = dataclasses.replace(config.model, quantize=QuantSpec())
    planner = CheckPlanner(size, dense, None, model_config, plan)
    planner.ids = tuple(range(len(config.lora.new_tokens)))
    found = planner.forecast(streamed=False)
    if found.peak > budget:
        with contextlib.suppress(ConfigError):  # of a model that is no list of blocks
            streamed = planner.forecast(streamed=True)
            if streamed.peak > budget:
                streamed = planner.forecast(streamed=True, slots=ALONE)
            found = min(found, streamed, key=lambda way: way.peak)
    return Phase(name, found.highest.kinds)
