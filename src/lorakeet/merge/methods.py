"""Methods to combine several changes of one matrix: the published ones as rows of a table over one function.

Every method works on ΔW_i = s_i·B_i·A_i, never on A and B: the product of their sums has cross terms that no adapter has.

                 kept of each ΔW_i                                   sum
    linear       all                                                 Σ w_i·ΔW_i
    cat          all; stays a concatenation of the factors           Σ w_i·ΔW_i
    svd          all; re-compressed                                  Σ w_i·ΔW_i
    magnitude    the largest `density` of its entries                Σ w_i·ΔW_i
    ties         the largest `density` (https://arxiv.org/abs/2306.01708)            mean of those with the elected sign
    dare         a random `density`, divided by it (https://arxiv.org/abs/2311.03099)                        Σ w_i·ΔW_i
    della        random, larger entries likelier (https://arxiv.org/abs/2406.11617)  mean of those with the elected sign

The elected sign of an entry is that of Σ w_i·ΔW_i over what was kept. The mean is weighted by |w_i| over the adapters that agree,
and multiplied by Σ |w_i|: if all agree it is the weighted sum; with weights that sum to 1 it is the papers' mean. If nothing is
dropped and all signs agree, every method equals `linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DELLA_WINDOW = 0.2  # difference of the drop probabilities of a row's smallest and largest entry (ε of the paper)

Prune = Callable[[Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class Method:
    """A method. `prune` None keeps everything, so that the sum is exact in low-rank factors."""

    name: str
    prune: Prune | None = None
    elect: bool = False  # entries vote on their sign
    random: bool = False
    compress: bool = False  # a rank is chosen if none is given

    @property
    def exact(self) -> bool:
        """True if the result is Σ w_i·ΔW_i exactly, apart from compression."""
        return self.prune is None and not self.elect


def keep_largest(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The round(density·n) entries of largest magnitude, the others 0; at least one."""
    del generator
    count = max(1, round(density * change.numel()))
    if count >= change.numel():
        return change
    kept = change.abs().flatten().topk(count, sorted=False).indices
    result = torch.zeros_like(change).flatten()
    result[kept] = change.flatten()[kept]
    return result.view_as(change)


def drop_random(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keeps each entry with probability `density` and divides it by that, so that the expectation is `change`."""
    return torch.where(torch.rand(change.shape, generator=generator) < density, change / density, 0.0)


def drop_by_magnitude(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """MagPrune of DELLA: in each row, an entry of rank r (0 the smallest) of n is kept with probability

        density − ε/2 + ε·r/(n − 1)

    and divided by it. ε is `DELLA_WINDOW`, or smaller to keep every probability above 0 and at most 1.
    """
    window = min(DELLA_WINDOW, density, 2 * (1 - density))
    ranks = change.abs().argsort(dim=1).argsort(dim=1).float()
    kept = density - window / 2 + window * ranks / max(change.shape[1] - 1, 1)
    return torch.where(torch.rand(change.shape, generator=generator) < kept, change / kept, 0.0)


@dataclass(frozen=True)
class Contribution:
    """An adapter's part in a matrix: a function that makes its ΔW, its weight, and a seed."""

    change: Callable[[], Tensor]  # a new fp32 (out, in)
    weight: float
    seed: int

    def pruned(self, method: Method, density: float) -> Tensor:
        """What the method keeps of ΔW, as a tensor that may be modified."""
        change = self.change()
        if method.prune is None:
            return change
        return method.prune(change, density, torch.Generator().manual_seed(self.seed))


METHODS = {
    method.name: method
    for method in (
        Method("linear"),
        Method("cat"),
        Method("svd", compress=True),
        Method("magnitude", keep_largest, compress=True),
        Method("ties", keep_largest, elect=True, compress=True),
        Method("dare", drop_random, random=True, compress=True),
        Method("della", drop_by_magnitude, elect=True, random=True, compress=True),
    )
}


def combine_changes(method: Method, parts: Sequence[Contribution], *, density: float, total: float | None = None) -> Tensor:
    """Combines the ΔW (out, in) of the adapters that change this matrix.

    `total` is Σ |w_i| over all adapters, also those that do not change this matrix; by default over `parts`. At most three
    matrices are in memory without sign election, and with it three and one for each adapter.
    """
    pruned = (part.pruned(method, density).mul_(part.weight) for part in parts)
    if not method.elect:
        result = next(pruned)
        for change in pruned:
            result.add_(change)
        return result
    changes = list(pruned)
    sign = torch.zeros_like(changes[0])
    for change in changes:
        sign.add_(change)
    sign.sign_()
    votes, result = torch.zeros_like(sign), torch.zeros_like(sign)
    for change, part in zip(changes, parts, strict=True):
        agrees = change * sign > 0
        result.add_(change.mul_(agrees))
        votes.add_(agrees, alpha=abs(part.weight))
    factor = sum(abs(part.weight) for part in parts) if total is None else total
    return result.mul_(factor).div_(votes.masked_fill_(votes == 0, 1.0))
