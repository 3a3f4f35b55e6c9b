"""What merging and exporting a run's adapter will hold under its budget: the models of the check whole in memory, or streamed.

A run under a budget merges and exports under it too (workflows/planning/check); a plan says beforehand what these take, from the
same sizes of the same checks, before there is an adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.errors import ConfigError
from lorakeet.export.llama_cpp import PASS, context_bytes
from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.merge.merged_folder import FP32_COPIES
from lorakeet.models.files.quantized import plain_config
from lorakeet.quant.spec import QuantSpec
from lorakeet.workflows.merge import size_of_merge
from lorakeet.workflows.planning.check import FP32, CheckPlanner, CheckSize, adapted_bytes, tensor_peak
from lorakeet.workflows.planning.forecast_choices import finished_plan
from lorakeet.workflows.planning.forecast_text_run import EXPORT, MERGE
from lorakeet.workflows.planning.rehearse_text import Judging, NotPlanned, RowShape
from lorakeet.workflows.planning.streaming import ALONE
from lorakeet.workflows.verification.checks import GREEDY_TOKENS
from lorakeet.workflows.verify import FEWEST_TOKENS, MARGIN


def later_phases(config: RunConfig, model_config: Any, plan: Plan, budget: int) -> tuple[Phase, ...]:
    """Merging and exporting an adapter of `plan` as they keep `budget`, or at the least that they take where they cannot.

    Empty for a model whose arithmetic cannot be followed on shapes.
    """
    dense, plan = plain_config(model_config), finished_plan(config, plan)
    text = dense.get_text_config()
    try:
        merge = _phase(MERGE, _planner(_size_of_merge(config, text, plan), config, dense, plan), budget)
        return merge, _export(config, dense, plan, budget)
    except NotPlanned:
        return ()


def with_later(forecast: Forecast, later: tuple[Phase, ...]) -> Forecast:
    """`forecast` with these phases in place of those of the same name."""
    names = {phase.name for phase in later}
    return Forecast((*(phase for phase in forecast.phases if phase.name not in names), *later))


def _export(config: RunConfig, model_config: Any, plan: Plan, budget: int) -> Phase:
    """With rows of data.max_tokens, or cut as `verify.plan_rows` cuts them."""
    length = config.data.max_tokens
    while True:
        size = _size_of_export(length, model_config.get_text_config(), plan)
        planner = _planner(size, config, model_config, plan)
        shortest = length <= FEWEST_TOKENS
        if shortest or planner.runtime + size.beside <= budget:  # else llama.cpp alone has no room: there is nothing to rehearse
            found = _phase(EXPORT, planner, budget)
            if shortest or found.bytes <= budget:
                return found
        length = max(FEWEST_TOKENS, length // 2)


def _size_of_merge(config: RunConfig, text: Any, plan: Plan) -> CheckSize:
    """What the check of a merged model holds at once."""
    table = int(text.vocab_size) * int(text.hidden_size)
    changed = adapted_bytes(plan, table)
    return size_of_merge(config.data.max_tokens, max((1 + FP32_COPIES) * changed, 2 * FP32 * table))


def _size_of_export(length: int, text: Any, plan: Plan) -> CheckSize:
    """What that of an exported one holds, of rows of `length` tokens; tensors count as stored in the widest dtype."""
    table, exported = int(text.vocab_size) * int(text.hidden_size), length + GREEDY_TOKENS
    changed = adapted_bytes(plan, table)
    return CheckSize(
        "the check of an export", Judging(RowShape(exported), 1, exported), models=1, row=min(exported, PASS), tensors=True,
        beside=context_bytes(text, exported + MARGIN), writing=tensor_peak(changed, table),
    )  # fmt: skip


def _planner(size: CheckSize, config: RunConfig, model_config: Any, plan: Plan) -> CheckPlanner:
    planner = CheckPlanner(size, dataclasses.replace(config.model, quantize=QuantSpec()), None, model_config, plan)
    planner.ids = tuple(range(len(config.lora.new_tokens)))
    return planner


def _phase(name: str, planner: CheckPlanner, budget: int) -> Phase:
    """At its peak with all weights in memory where that fits, else with two blocks of each model, or with one."""
    whole = None if planner.alone > budget else planner.forecast(streamed=False)
    if whole is not None and whole.peak <= budget:
        return Phase(name, whole.highest.kinds)
    streamed = None
    with contextlib.suppress(ConfigError):  # of a model that is no list of blocks
        streamed = planner.forecast(streamed=True)
        if streamed.peak > budget:
            streamed = planner.forecast(streamed=True, slots=ALONE)
    if whole is None and (streamed is None or streamed.peak > planner.alone):
        whole = planner.forecast(streamed=False)
    found = min((way for way in (whole, streamed) if way is not None), key=lambda way: way.peak)
    return Phase(name, found.highest.kinds)
