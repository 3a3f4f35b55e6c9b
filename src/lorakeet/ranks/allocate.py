"""Allocates a parameter budget greedily: each next rank goes to the matrix with the greatest gain per parameter."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError, DataError

Gains = Mapping[str, Sequence[float]]  # by path: the gain of rank 1, 2, …, non-increasing


def allocate(plan: Plan, gains: Gains, budget: int, *, largest: int | None = None, step: int = 1) -> Plan:
    """Returns `plan` with new ranks: at most `budget` parameters in all pairs, Σ gains maximised greedily.

    Every pair keeps at least rank `step`, and gets at most `largest` and as many ranks as it has gains. Gains never rise, so the
    greedy choice by gain per parameter is optimal up to the last few parameters. The budget is spent even on gains of 0 or less,
    last and in the plan's order. Raises ConfigError for a budget below rank `step` each or above the largest ranks, DataError
    for non-finite gains.
    """
    wrong = [path for path, values in gains.items() if not all(math.isfinite(value) for value in values)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DataError(
            f"The gains of ranks in '{wrong[0]}'{more} are not finite (of {len(gains)} matrices). The model's loss or "
            "states are not finite on these rows: try model.dtype float32, or give ranks in lora.rank_pattern."
        )
    ceilings = {}
    for entry in plan.entries:
        most = min(len(gains[entry.path]), entry.largest_rank, largest or entry.largest_rank)
        ceilings[entry.path] = max(step, most - most % step)
    ranks = {entry.path: step for entry in plan.entries}
    _check_budget(plan, budget, ceilings, step)
    left = budget - sum(replace(entry, rank=step).parameters for entry in plan.entries)
    costs = {entry.path: step * rank_cost(entry) for entry in plan.entries}
    order = {entry.path: number for number, entry in enumerate(plan.entries)}

    def worth(path: str) -> tuple[float, int, str]:
        rank = ranks[path]
        return -max(0.0, sum(gains[path][rank : rank + step])) / costs[path], order[path], path

    queue = [worth(path) for path in ranks if ranks[path] + step <= ceilings[path]]
    heapq.heapify(queue)
    while queue:
        _, _, path = heapq.heappop(queue)
        if costs[path] > left:
            continue  # a smaller matrix may still fit
        ranks[path] += step
        left -= costs[path]
        if ranks[path] + step <= ceilings[path]:
            heapq.heappush(queue, worth(path))
    return replace(plan, entries=tuple(replace(entry, rank=ranks[entry.path]) for entry in plan.entries))


def rank_cost(entry: PlanEntry) -> int:
    """Parameters of one more rank of the pair: in + out, times experts."""
    return replace(entry, rank=2).parameters - replace(entry, rank=1).parameters


def pair_parameters(plan: Plan) -> int:
    """Parameters of all pairs of the plan, DoRA's lengths included, extras not."""
    return sum(entry.parameters for entry in plan.entries)


def rank_pattern(plan: Plan, spec: LoraSpec) -> dict[str, int]:
    """The `lora.rank_pattern` that, with `lora.rank`, gives the ranks of `plan`: a full path for each other rank."""
    return {entry.path: entry.rank for entry in plan.entries if entry.rank != spec.rank}


def _check_budget(plan: Plan, budget: int, ceilings: Mapping[str, int], step: int) -> None:
    least = sum(replace(entry, rank=step).parameters for entry in plan.entries)
    full = sum(replace(entry, rank=entry.largest_rank).parameters for entry in plan.entries)
    most = sum(replace(entry, rank=ceilings[entry.path]).parameters for entry in plan.entries)
    count = len(plan.entries)
    if budget < least:
        raise ConfigError(
            f"The budget of {budget:,} parameters is below rank {step} for each of the {count} targets, which need {least:,}. "
            "Raise the budget, or name fewer lora.target_modules."
        )
    if budget > full:
        raise ConfigError(
            f"The budget of {budget:,} parameters is above the full rank of all {count} targets, which has {full:,}. Lower the "
            "budget: a pair above full rank has more parameters than directions."
        )
    if budget > most:
        raise ConfigError(
            f"The budget of {budget:,} parameters is above that of the highest measured rank ({most:,} for "
            f"{count} targets of rank {max(ceilings.values())} at most). Lower the budget, or raise ranks.max_rank."
        )
