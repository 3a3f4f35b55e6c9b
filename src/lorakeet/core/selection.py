"""Which adapter counts: one Selection for all adapted layers of a model, so that switching is one assignment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Layout = tuple[tuple[str, int, float], ...]  # (adapter, rank, scale) of the pairs of a stack, in order


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
        self._gates: dict[tuple[Layout, int, torch.dtype, torch.device], Tensor] = {}

    def use(self, name: str | None) -> None:
        """Everything uses the adapter `name`, or the bare base. The name is not checked here; see models/inject.activate."""
        self.active, self.shares = name, None
        self._gates.clear()

    def divide(self, shares: Iterable[Share], *, units: int) -> None:
        """The next batches have `units` units, and each share of them its adapter; units in no share use the bare base.

        Raises ValueError for a share that does not lie within the batch.
        """
        given = tuple(shares)
        for share in given:
            if not 0 <= share.start < share.stop <= units:
                raise ValueError(f"{share} does not lie within a batch of {units}")
        self.shares, self.units = given, units
        self._gates.clear()

    def shares_over(self, tokens: int) -> tuple[Share, ...]:
        """The shares in tokens, where a layer sees `tokens` of them: as many for each unit."""
        shares = self.shares or ()
        each, rest = divmod(tokens, self.units)
        if rest:
            raise ValueError(f"a layer sees {tokens} tokens, which is no multiple of the batch's {self.units} units")
        if each == 1:
            return shares
        return tuple(Share(share.start * each, share.stop * each, share.name, share.weight) for share in shares)

    def gates(self, layout: Layout, tokens: int, like: Tensor) -> Tensor:
        """`gates_of` the shares, kept until they change: every layer with the same ranks and scales asks for the same."""
        key = layout, tokens, like.dtype, like.device
        if key not in self._gates:
            self._gates[key] = gates_of(self.shares_over(tokens), layout, tokens, like)
        return self._gates[key]


def gates_of(shares: Iterable[Share], layout: Layout, tokens: int, like: Tensor) -> Tensor:
    """(tokens, Σ rank): weight·scale where a token uses a pair of the stack `layout`, else 0; dtype and device of `like`."""
    starts: dict[str, tuple[int, int, float]] = {}
    width = 0
    for name, rank, scale in layout:
        starts[name] = (width, width + rank, scale)
        width += rank
    gates = torch.zeros(tokens, width)
    for share in shares:
        if share.name in starts:
            first, last, scale = starts[share.name]
            gates[share.start : share.stop, first:last] += share.weight * scale
    return gates.to(device=like.device, dtype=like.dtype)
