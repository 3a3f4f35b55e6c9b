"""Rank pruning during training: pairs, moments and importance are cut for good at set steps (mathematics: ranks/prune).

    before the last cut  each step: gradients → importance
    at a cut             removes rows of A, columns of B, their moments and their importance, which saves memory and time
    after the last cut   an ordinary run at the final budget

A checkpoint's tensors have the shapes of their step; a resumed run cuts its new pairs to them before loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from lorakeet.core.math import term_dims
from lorakeet.core.plan import Plan
from lorakeet.memory.allocator import release_free_memory
from lorakeet.ranks.allocate import pair_parameters
from lorakeet.ranks.prune import Importance, most_important, with_ranks
from lorakeet.train.optimizer import Optimizer

Cut = dict[str, int]  # the record of a cut in metrics.jsonl


class Pruning:
    """The rank pruning of one run. `cuts` is the budget in parameters by step; `keep` cuts the pair at a path to some terms.

    The best adapter must meet the final budget, so held-out losses before the last cut are not candidates (`counts`).
    """

    def __init__(self, plan: Plan, cuts: Mapping[int, int], keep: Callable[[str, Tensor], None]) -> None:
        self.plan, self.cuts, self.last = plan, dict(cuts), max(cuts)
        self.importance = Importance(plan)
        self._keep, self._dims = keep, {entry.path: term_dims(entry.kind) for entry in plan.entries}

    def counts(self, step: int) -> bool:
        """True if the held-out loss after `step` is that of the base, or of a candidate for the best adapter."""
        return step == 0 or step >= self.last

    def awaited(self, best_step: int | None) -> str:
        """A sentence, after a space, about RUN/adapter before the first best step; empty otherwise."""
        if best_step is not None:
            return ""
        return f" There is no adapter yet: the first follows a held-out evaluation after the last cut, in step {self.last}."

    def see(self, step: int, parameters: Mapping[str, Parameter]) -> None:
        """Adds the unclipped gradients of step `step` to the importance."""
        if step <= self.last:
            self.importance.see(parameters)

    def after(self, step: int, optimizer: Optimizer) -> Cut | None:
        """Cuts the pairs if `step` has a cut, and returns its record."""
        if step not in self.cuts:
            return None
        terms = most_important(self.plan, self.importance.of_terms(), self.cuts[step])
        for path, kept in terms.items():
            self._cut(path, kept, optimizer)
        if step == self.last:
            self.importance.forget()
        release_free_memory()  # so that the C library returns it to the system
        ranks = {path: len(kept) for path, kept in terms.items()}
        left = pair_parameters(with_ranks(self.plan, ranks))
        found = {"rank_budget": self.cuts[step], "pair_parameters": left, "pairs": sum(rank > 0 for rank in ranks.values())}
        return {"step": step, **found, "lowest_rank": min(ranks.values()), "highest_rank": max(ranks.values())}

    def take_over(self, shapes: Mapping[str, torch.Size], importance: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """Cuts the pairs to the `shapes` of a checkpoint's tensors, and loads its importance."""
        for entry in self.plan.entries:
            rank = shapes[f"{entry.path}.A"][self._dims[entry.path][0]]
            if rank < entry.rank:
                self._cut(entry.path, torch.arange(rank), optimizer)
        self.importance.load(importance, next(iter(optimizer.parameters.values())).device)

    def _cut(self, path: str, terms: Tensor, optimizer: Optimizer) -> None:
        shapes = {name: optimizer.parameters[name].shape for name in (f"{path}.A", f"{path}.B")}
        self._keep(path, terms)
        for (name, shape), dim in zip(shapes.items(), self._dims[path], strict=True):
            optimizer.keep(name, shape, dim, terms)
        self.importance.keep(path, terms)


def cut_text(cut: Cut) -> str:
    """The record of a cut in words."""
    return (
        f"Step {cut['step']}: ranks cut to {cut['pair_parameters']:,} of at most {cut['rank_budget']:,} parameters: "
        f"{cut['pairs']} pairs, ranks {cut['lowest_rank']} to {cut['highest_rank']}."
    )
