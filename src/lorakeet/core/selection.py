"""Which adapter counts: one Selection for all adapted layers of a model, so that switching is one assignment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Layout = tuple[tuple[str, float], ...]  # (adapter, scale) of the pairs of a stack, in order
Table = tuple[Tensor, Tensor]  # which tokens each pair of a stack sees, and weight·scale of each; see table_of


@dataclass(frozen=True)
class Share:
    """The units start … stop − 1 of a batch use `name` with `weight`; weight 1 is the adapter as it is.

    A unit is a token of rows laid end to end, or a row or picture of a padded batch.
    """

    start: int
    stop: int
    name: str
    weight: float = 1.0


class Selection:
    """The adapter that all units use (`active`), or the `shares` of a batch of `units` whose units use different ones."""

    def __init__(self) -> None:
        self.active: str | None = None
        self.shares: tuple[Share, ...] | None = None
        self.units = 0
        self._tables: list[tuple[tuple[Layout, tuple[Share, ...], torch.dtype, torch.device], Table]] = []

    def use(self, name: str | None) -> None:
        """Everything uses the adapter `name`, or the bare base. The name is not checked here; see models/inject.activate."""
        self.active, self.shares = name, None
        self._tables.clear()

    def divide(self, shares: Iterable[Share], *, units: int) -> None:
        """The next batches have `units` units, and each share of them its adapter; units in no share use the bare base.

        Raises ValueError for a share that does not lie within the batch.
        """
        given = tuple(shares)
        for share in given:
            if not 0 <= share.start < share.stop <= units:
                raise ValueError(f"{share} does not lie within a batch of {units}")
        if given == self.shares and units == self.units:
            return  # the same rows write another token: what was worked out for them still holds
        self.shares, self.units = given, units
        self._tables.clear()

    def shares_over(self, tokens: int) -> tuple[Share, ...]:
        """The shares in tokens, where a layer sees `tokens` of them: as many for each unit."""
        shares = self.shares or ()
        each, rest = divmod(tokens, self.units)
        if rest:
            raise ValueError(f"a layer sees {tokens} tokens, which is no multiple of the batch's {self.units} units")
        if each == 1:
            return shares
        return tuple(Share(share.start * each, share.stop * each, share.name, share.weight) for share in shares)

    def table(self, layout: Layout, shares: tuple[Share, ...], like: Tensor) -> Table:
        """`table_of` the shares, kept until they change: every layer with the same adapters and scales asks for the same.

        The few there are, are compared one by one: to hash as many shares as a batch has rows takes ten times as long.
        """
        key = layout, shares, like.dtype, like.device
        for known, found in self._tables:
            if known == key:
                return found
        self._tables.append((key, table_of(shares, layout, like)))
        return self._tables[-1][1]


def table_of(shares: Iterable[Share], layout: Layout, like: Tensor) -> Table:
    """For a stack of P pairs: tokens (P·m,) and factors (P, m, 1), where m is the most tokens that one pair sees.

    Each pair's tokens come with weight·scale; a pair with fewer of them sees token 0 with factor 0. Dtype and device of `like`.
    """
    seen: dict[str, dict[int, float]] = {name: {} for name, _ in layout}
    for share in shares:
        if share.name in seen:
            mine = seen[share.name]
            for token in range(share.start, share.stop):
                mine[token] = mine.get(token, 0.0) + share.weight
    most = max((len(mine) for mine in seen.values()), default=0)
    tokens, factors = [], []
    for name, scale in layout:
        mine, empty = seen[name], most - len(seen[name])
        tokens += [*mine, *([0] * empty)]
        factors += [*(weight * scale for weight in mine.values()), *([0.0] * empty)]
    found = torch.tensor(factors).view(len(layout), most, 1)
    return torch.tensor(tokens, dtype=torch.int64).to(like.device), found.to(device=like.device, dtype=like.dtype)
