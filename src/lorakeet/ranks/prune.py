"""Selects the rank-one terms of pairs to prune during training: AdaLoRA's importance and budget, on plain A and B.

    ΔW = s·B·A = s·Σ_i b_i·a_iᵀ        a_i a row of A, b_i a column of B

From AdaLoRA (Zhang et al. 2023, https://arxiv.org/abs/2303.10512): the sensitivity of a trained number, |w·∂L/∂w|, and its
uncertainty, both smoothed over steps; their product, averaged over the numbers of one rank, as its importance; one ranking over
all matrices; and a budget with a cubic schedule between warm-up and final phase. Not from AdaLoRA: the form P·Λ·Q with its
singular values and orthogonality penalty, and masks. Here a pruned term is removed for good, in a few steps instead of every
hundred. That is structured pruning of LoRA's doublets, a baseline of the paper. Budgets count parameters; the paper counts ranks.
Numbers that never had a gradient (tokens in no row, experts never chosen) are left out of the averages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorakeet.core.math import term_dims
from lorakeet.core.plan import Plan
from lorakeet.errors import ConfigError
from lorakeet.ranks.allocate import pair_parameters, rank_cost
from lorakeet.ranks.spec import RanksSpec, parameter_count

SMOOTHING = 0.85  # β₁ and β₂ of the paper
START_OVER_END = 1.5  # the paper's first budget over its last
FIRST_CUT = 3  # earliest step with a cut: sensitivity needs one step after B = 0, uncertainty another


class Importance:
    """The importance of each rank-one term of the pairs of a plan, from the gradients passed to `see`.

    For each number w of A and B it stores, in fp32 and by the parameter's name,

        sensitivity  Ī ← β₁·Ī + (1 − β₁)·I, I = |w·∂L/∂w|        uncertainty  Ū ← β₂·Ū + (1 − β₂)·|I − Ī|
    """

    def __init__(self, plan: Plan) -> None:
        self._dims = {entry.path: term_dims(entry.kind) for entry in plan.entries}
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}

    @torch.no_grad()
    def see(self, parameters: Mapping[str, Tensor]) -> None:
        """Adds one step's gradients of `parameters` (PATH.A, PATH.B); a missing gradient counts as 0."""
        for name in (f"{path}.{factor}" for path in self._dims for factor in "AB"):
            parameter = parameters[name]
            if name not in self._sensitivity:
                self._sensitivity[name], self._uncertainty[name] = (torch.zeros_like(parameter) for _ in range(2))
            smooth = self._sensitivity[name]
            now = torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs_()
            smooth.lerp_(now, 1 - SMOOTHING)
            self._uncertainty[name].lerp_(now.sub_(smooth).abs_(), 1 - SMOOTHING)

    def of_terms(self) -> dict[str, Tensor]:
        """By path the importance (rank,) of each term, fp64 on the CPU: the mean of Ī·Ū over a_i, plus that over b_i.

        Each mean is over numbers that ever had a gradient, so that tokens in no row and experts never chosen do not lower it.
        0 if none had one.
        """
        return {path: self._mean(f"{path}.A", dims[0]) + self._mean(f"{path}.B", dims[1]) for path, dims in self._dims.items()}

    def _mean(self, name: str, dim: int) -> Tensor:
        sensitivity = self._sensitivity[name].cpu().double()  # not every device has fp64
        found = (sensitivity * self._uncertainty[name].cpu().double()).movedim(dim, 0).flatten(1)
        return found.sum(1) / (sensitivity.movedim(dim, 0).flatten(1) > 0).sum(1).clamp(min=1)

    def keep(self, path: str, terms: Tensor) -> None:
        """Keeps only these terms of a pair."""
        for name, dim in zip((f"{path}.A", f"{path}.B"), self._dims[path], strict=True):
            for kept in (self._sensitivity, self._uncertainty):
                if name in kept:
                    kept[name] = kept[name].index_select(dim, terms.to(kept[name].device))

    def forget(self) -> None:
        """Drops all state, after the last cut."""
        self._sensitivity, self._uncertainty = {}, {}

    def state(self) -> dict[str, Tensor]:
        """The state, not copied, by `parameter|what`; empty before the first step."""
        kept = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty}
        return {f"{name}|{what}": tensor.cpu() for what, tensors in kept.items() for name, tensor in tensors.items()}

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Restores the result of `state`, bit for bit."""
        self.forget()
        for key, tensor in state.items():
            name, _, what = key.rpartition("|")
            (self._sensitivity if what == "sensitivity" else self._uncertainty)[name] = tensor.clone().to(device)


def final_budget(spec: RanksSpec, plan: Plan) -> int:
    """Parameters of all pairs after pruning. Raises ConfigError if no term is left, or nothing is cut."""
    at_first = pair_parameters(plan)
    budget = math.floor(at_first / START_OVER_END) if spec.budget is None else parameter_count(spec.budget, "ranks.budget")
    least = min((rank_cost(entry) for entry in plan.entries), default=0)
    if budget >= at_first or not plan.entries:
        raise ConfigError(
            f"The budget of {budget:,} parameters is not below the initial {at_first:,} in {len(plan.entries)} pairs, so "
            "ranks.choose prune has nothing to cut. Lower ranks.budget, or raise the initial lora.rank."
        )
    if budget < least:
        raise ConfigError(
            f"The budget of {budget:,} parameters is below one rank of the smallest target, which needs {least:,}. Raise "
            "ranks.budget, or use ranks.choose given."
        )
    return budget


def cuts(spec: RanksSpec, total: int, *, at_first: int, budget: int) -> dict[int, int]:
    """The cuts of a run of `total` steps: parameters to keep, by step; spread evenly, the last to `budget`.

        b(t) = b_T + (b_0 − b_T)·(1 − (t − t_i) / (T − t_f − t_i))³

    for t_i = prune_from·T and T − t_f = prune_until·T (the paper's equation, there in ranks). Raises ConfigError for a run that
    is too short to measure importance before the first cut.
    """
    begin, end = math.floor(spec.prune_from * total), math.floor(spec.prune_until * total)
    steps = [begin + math.ceil((end - begin) * number / spec.prune_cuts) for number in range(1, spec.prune_cuts + 1)]
    if end <= begin or steps[0] < FIRST_CUT:
        raise ConfigError(
            f"A run of {total} steps would be pruned after step {steps[0]}, between ranks.prune_from {spec.prune_from:g} and "
            f"prune_until {spec.prune_until:g} of it, but importance needs {FIRST_CUT} steps. Use more steps, fewer "
            "ranks.prune_cuts, or a later prune_until; or use --ranks auto."
        )
    return {step: budget + math.floor((at_first - budget) * (1 - (step - begin) / (end - begin)) ** 3) for step in steps}


def most_important(plan: Plan, importance: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """By path the indices, ascending, of the terms to keep: the most important of all within `budget` parameters.

    Importance, by path (rank,), is a mean, so it is already relative to size. If the next term does not fit, smaller ones may;
    ties go by order in the plan. A matrix may keep all of its terms or none.
    """
    costs = {entry.path: rank_cost(entry) for entry in plan.entries}
    ranked = [
        (-score, order, number, entry.path)
        for order, entry in enumerate(plan.entries)
        for number, score in enumerate(importance[entry.path].tolist())
    ]
    kept: dict[str, list[int]] = {entry.path: [] for entry in plan.entries}
    left = budget
    for _, _, number, path in sorted(ranked):
        if costs[path] <= left:
            left -= costs[path]
            kept[path].append(number)
    return {path: torch.tensor(sorted(numbers), dtype=torch.int64) for path, numbers in kept.items()}


def with_ranks(plan: Plan, ranks: Mapping[str, int]) -> Plan:
    """`plan` with pairs cut to these ranks at unchanged scales, without pairs of rank 0."""
    return replace(plan, entries=tuple(entry.cut(ranks[entry.path]) for entry in plan.entries if ranks[entry.path]))
