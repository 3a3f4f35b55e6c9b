"""What merging and exporting a run's adapter will take under its budget: the models of the check whole in memory, or streamed.

A run under a budget merges and exports under it too (workflows/planning/check); a plan says beforehand what these take, from the
same sizes of the same checks, before there is an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.export.llama_cpp import PASS, context_bytes
from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.merge.merged_folder import FP32_COPIES
from lorakeet.models.files.quantized import plain_config
from lorakeet.quant.spec import QuantSpec
from lorakeet.workflows.planning.check import ModelCheck
from lorakeet.workflows.planning.check_sizes import (
    FP32,
    GREEDY_TOKENS,
    MARGIN,
    CheckSize,
    adapted_bytes,
    size_of_merge,
    tensor_peak,
)
from lorakeet.workflows.planning.fit import choose
from lorakeet.workflows.planning.forecast_choices import finished_plan
from lorakeet.workflows.planning.forecast_text_run import EXPORT, MERGE
from lorakeet.workflows.planning.rehearse_text import EvaluationSize, NotPlanned, RowShape


def later_phases(config: RunConfig, model_config: Any, plan: Plan, budget: Budget) -> tuple[Phase, ...]:
    """Merging and exporting an adapter of `plan` as they keep `budget`, or at the least that they take if they cannot.

    Empty for a model whose arithmetic cannot be followed on shapes.
    """
    dense, pairs = plain_config(model_config), finished_plan(config, plan)
    spec, ids = replace(config.model, quantize=QuantSpec()), tuple(range(len(config.lora.new_tokens)))
    text = dense.get_text_config()

    def phase(name: str, sizes: Callable[[int | None], CheckSize]) -> Phase:
        check = ModelCheck(sizes, spec, lambda: (dense, None), lambda _: pairs, ids=ids, cut=name == EXPORT)
        return Phase(name, choose(check, budget).least.highest.kinds)

    try:
        return phase(MERGE, lambda _: _size_of_merge(config, text, pairs)), phase(
            EXPORT, lambda longest: _size_of_export(min(config.data.max_tokens, longest or config.data.max_tokens), text, pairs)
        )
    except NotPlanned:
        return ()


def with_later(forecast: Forecast, later: tuple[Phase, ...]) -> Forecast:
    """`forecast` with these phases in place of those of the same name."""
    names = {phase.name for phase in later}
    return Forecast((*(phase for phase in forecast.phases if phase.name not in names), *later))


def _size_of_merge(config: RunConfig, text: Any, plan: Plan) -> CheckSize:
    """The size of the check of a merged model."""
    table = int(text.vocab_size) * int(text.hidden_size)
    changed = adapted_bytes(plan, table)
    return size_of_merge(config.data.max_tokens, max((1 + FP32_COPIES) * changed, 2 * FP32 * table))


def _size_of_export(length: int, text: Any, plan: Plan) -> CheckSize:
    """That of an exported one, with rows of `length` tokens; tensors count as stored in the widest dtype."""
    table, exported = int(text.vocab_size) * int(text.hidden_size), length + GREEDY_TOKENS
    changed = adapted_bytes(plan, table)
    return CheckSize(
        "the check of an export", EvaluationSize(RowShape(exported), 1, exported), models=1, row=min(exported, PASS),
        tensors=True, beside=context_bytes(text, exported + MARGIN), writing=tensor_peak(changed, table),
    )  # fmt: skip
