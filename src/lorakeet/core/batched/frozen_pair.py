"""Pairs that are never trained, made by the hundred while another thread computes: what they have in common they share.

torch gives each module some fifteen tables, for its parameters, hooks and more. Making them is most of the time in which a pair
is made, and they are most of what the garbage collector looks at. Those of frozen pairs are empty, so they can be the same.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NoReturn, cast

from torch import Tensor, nn

from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import Kind, ScaleRule


class FrozenPair(LoraPair):
    """A pair without dropout, bias or anchor, whose A and B are buffers and cannot be trained.

    Hooks and modules within raise TypeError, parameters AttributeError. A copy of it is a frozen pair, too.
    """

    dropout = 0.0
    bias = anchor_A = anchor_B = None

    def __init__(self, A: Tensor, B: Tensor, scale: float, kind: Kind = "linear", scale_rule: ScaleRule = "alpha/rank") -> None:
        """A and B are taken as they are, without a copy."""
        # Not one by one: nn.Module looks at each as if it were a tensor.
        vars(self).update(_buffers={"A": A, "B": B}, scale=scale, kind=kind, scale_rule=scale_rule)

    @property
    def plain(self) -> bool:
        """It always is LoRA alone."""
        return True

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, without nn.Module's look through all tables for each: a text's adapter is asked for hundreds of them."""
        held = cast("dict[str, Tensor]", self._buffers)
        return held["A"], held["B"]


class _Nothing(OrderedDict[Any, Any]):
    """The one empty table of frozen pairs, which stays empty."""

    def __setitem__(self, key: object, value: object) -> NoReturn:
        raise TypeError(f"a frozen pair shares its tables with others, so {key!r} cannot be put into one")


class _NoNames(frozenset[str]):
    """The names in such a table: torch takes one out before it puts another in its place."""

    def discard(self, name: str) -> None:
        """There is none to take out."""

    def add(self, name: str) -> NoReturn:
        raise TypeError(f"a frozen pair shares its tables with others, so {name!r} cannot be put into one")


_NOTHING = _Nothing()
for _name, _value in vars(nn.Module()).items():
    if _name != "_buffers":
        setattr(FrozenPair, _name, _NOTHING if isinstance(_value, dict) else _NoNames() if isinstance(_value, set) else _value)
FrozenPair.training = False
