"""`--ranks prune`: the cuts of a run before it begins, what carries them out, and the Plan of what they left."""

from __future__ import annotations

from functools import partial

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.models.inject import adapter_of, drop_empty, keep_terms
from lorakeet.models.text.model import TextModel
from lorakeet.ranks.allocate import pair_parameters
from lorakeet.ranks.prune import cuts, final_budget, with_ranks
from lorakeet.runs.open_adapter import NAME
from lorakeet.train.pruning import Pruning


def cuts_of(config: RunConfig, plan: Plan, steps: int) -> dict[int, int]:
    """After which of its steps a run cuts the pairs of `plan`, and to how many parameters; empty unless ranks.choose is prune.

    Raises ConfigError for a budget that leaves nothing, or nothing to cut, and for a run that is too short.
    """
    spec = config.ranks
    if spec.choose != "prune":
        return {}
    return cuts(spec, steps, at_first=pair_parameters(plan), budget=final_budget(spec, plan))


def pruning_of(config: RunConfig, text: TextModel, plan: Plan, steps: int) -> Pruning | None:
    """What cuts the pairs of the run's adapter in training; None unless ranks.choose is prune. Raises as `cuts_of` does."""
    found = cuts_of(config, plan, steps)
    return Pruning(plan, found, partial(keep_terms, text.model, name=NAME)) if found else None


def pruned_plan(text: TextModel, plan: Plan) -> Plan:
    """The Plan that the run's adapter, trained and cut, now amounts to; pairs of rank 0 are taken out of the model."""
    drop_empty(text.model, NAME)
    left = adapter_of(text.model, NAME).pairs
    return with_ranks(plan, {entry.path: left[entry.path].rank if entry.path in left else 0 for entry in plan.entries})
