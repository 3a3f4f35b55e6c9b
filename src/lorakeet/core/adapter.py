"""The Adapter: what a run produces. A plain value of named A, B and alpha; it needs no model.

Every format in `formats/` is `read(path) -> Adapter` and `write(adapter, path)`; converting is reading and writing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lorakeet.core.math import Kind, ScaleRule, delta, scale_of


@dataclass(frozen=True)
class Pair:
    """One A and B of an adapter with what is needed to use them (shapes: table in core/math)."""

    A: Tensor
    B: Tensor
    alpha: float
    kind: Kind = "linear"
    scale_rule: ScaleRule = "alpha/rank"
    magnitude: Tensor | None = None  # DoRA's length of each row of W', (out,)
    bias: Tensor | None = None  # PEFT's `lora_bias`: added to B·A·x before the scale, (out,)

    @property
    def rank(self) -> int:
        return self.A.shape[1] if self.kind == "experts" else self.A.shape[0]

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.scale_rule)

    def delta(self) -> Tensor:
        """scale·B·A in the shape of the frozen weight, fp32; for DoRA the change before the rows are rescaled."""
        return delta(self.A.float(), self.B.float(), self.scale, self.kind)


@dataclass(frozen=True)
class TokenRows:
    """Trained rows of an embedding: the rows themselves (not their change), by token id."""

    ids: tuple[int, ...]
    rows: Tensor  # (len(ids), hidden)
    tokens: tuple[str, ...] = ()
    tied: str = ""  # path of the head that shares them


@dataclass(frozen=True)
class Adapter:
    """A whole set of pairs, by the path of the module (of the parameter, for experts) that each belongs to."""

    pairs: Mapping[str, Pair]
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # whole parameters by their path in the model
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)  # by embedding path
    base: str = ""  # name of the base model
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        pairs = sum(t.numel() for p in self.pairs.values() for t in (p.A, p.B, p.magnitude, p.bias) if t is not None)
        return pairs + sum(t.numel() for t in self.extras.values()) + sum(r.rows.numel() for r in self.token_rows.values())
