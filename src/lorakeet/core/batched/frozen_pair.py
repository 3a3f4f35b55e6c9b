"""Pairs that are never trained, made by the hundred while another thread computes: they share their tables.

torch gives each module some fifteen tables, for its parameters, hooks and more. Creating them is most of the time in which a
pair is created, and most of what the garbage collector visits. Those of frozen pairs are empty, so they can be shared.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NoReturn, cast

from torch import Tensor, nn

from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import Kind, ScaleRule


class FrozenPair(LoraPair):
    """A pair without dropout, bias or initial values, whose A and B are buffers and cannot be trained.

    Hooks and modules within raise TypeError, parameters AttributeError. A copy of it is a frozen pair, too.
    """

    dropout = 0.0
    bias = anchor_A = anchor_B = None

    def __init__(self, A: Tensor, B: Tensor, scale: float, kind: Kind = "linear", scale_rule: ScaleRule = "alpha/rank") -> None:
        """A and B are not copied."""
        # together: nn.Module checks each assignment for a tensor
        vars(self).update(_buffers={"A": A, "B": B}, scale=scale, kind=kind, scale_rule=scale_rule)

    @property
    def plain(self) -> bool:
        """Always True."""
        return True

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, without nn.Module's lookup in all tables: generation needs hundreds of them."""
        held = cast("dict[str, Tensor]", self._buffers)
        return held["A"], held["B"]


class _Nothing(OrderedDict[Any, Any]):
    """The one empty table of frozen pairs."""

    def __setitem__(self, key: object, value: object) -> NoReturn:
        raise TypeError(f"a frozen pair shares its tables with others, so {key!r} cannot be put into one")


class _NoNames(frozenset[str]):
    """The names in such a table: torch removes one before it adds another."""

    def discard(self, name: str) -> None:
        """Does nothing: there is none."""

    def add(self, name: str) -> NoReturn:
        raise TypeError(f"a frozen pair shares its tables with others, so {name!r} cannot be put into one")


_NOTHING = _Nothing()
for _name, _value in vars(nn.Module()).items():
    if _name != "_buffers":
        setattr(FrozenPair, _name, _NOTHING if isinstance(_value, dict) else _NoNames() if isinstance(_value, set) else _value)
FrozenPair.training = False
