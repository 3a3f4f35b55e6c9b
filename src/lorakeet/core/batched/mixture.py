"""The pairs of a mix on a layer, for copies in divided batches, and whether a copy is still valid."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorakeet.core.batched.frozen_pair import FrozenPair
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.selection import Mix, MixState

Mixture = Sequence[tuple[LoraPair, float]]  # the pairs of a mix on one layer, with weights
Factors = tuple[Tensor, Tensor, float]  # A and B of a pair as used, and what their product is multiplied by
Held = Sequence[Mapping[str, LoraPair]]  # the pairs of some layers, each by adapter


@dataclass(frozen=True)
class CopySource:
    """The source of a copy: a mix, and the copied tensors with their versions at that time, but frozen ones, which stay."""

    what: MixState
    tensors: tuple[weakref.ref[Tensor], ...]
    written: int

    @classmethod
    def of(cls, what: MixState, layers: Iterable[Mixture]) -> CopySource:
        pairs = [pair for mixture in layers for pair, _ in mixture if not isinstance(pair, FrozenPair)]
        factors: list[Tensor] = [factor for pair in pairs for factor in (pair.A, pair.B)]
        tensors = tuple(weakref.ref(factor) for factor in factors if factor.requires_grad and not factor.is_inference())
        return cls(what, tensors, _written(tensors))

    def stands_for(self, what: MixState) -> bool:
        """True if the copy is still valid for that."""
        return self.what == what and self.written == _written(self.tensors)


def mixtures(mix: Mix, pairs: Held) -> list[Mixture]:
    """The pairs of a mix, for each layer."""
    return [[(held[name], weight) for name, weight in mix if name in held] for held in pairs]


def all_plain(mixture: Mixture) -> bool:
    """True if no pair is special."""
    return all(pair.plain for pair, _ in mixture)


def factors_of(mixture: Mixture) -> list[Factors]:
    """The factors of a mix on one layer; empty if one of its pairs is special."""
    found = []
    for pair, weight in mixture:
        if isinstance(pair, FrozenPair):
            A, B = pair.factors()
        elif pair.plain:
            A, B = (factor.detach() for factor in pair.factors())
        else:
            return []
        found.append((A, B, pair.scale * weight))
    return found


def _written(tensors: Iterable[weakref.ref[Tensor]]) -> int:
    """The sum of the tensors' versions."""
    return sum(tensor._version for known in tensors if (tensor := known()) is not None)
