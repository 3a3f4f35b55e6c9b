"""The Plan: which matrix gets which pair, decided before anything is allocated. Plain data; `models/targets` makes it.

The Plan can be printed before anything is allocated; `models/inject` does what it says and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lorakeet.core.math import Kind, ScaleRule, alpha_for, scale_of
from lorakeet.errors import percent


@dataclass(frozen=True)
class PlanEntry:
    """One frozen weight that gets a low-rank pair."""

    path: str  # of the module, or of the parameter for experts
    kind: Kind
    shape: tuple[int, ...]  # of the frozen weight, as (out, in), (vocab, hidden), (out, in, k, k) or (experts, out, in)
    rank: int
    alpha: float
    scale_rule: ScaleRule = "alpha/rank"
    variant: Literal["lora", "dora"] = "lora"
    start: Literal["kaiming", "gaussian", "pissa", "olora", "orthogonal", "gradient", "activation"] = "kaiming"
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.scale_rule)

    def cut(self, rank: int) -> PlanEntry:
        """The same with another rank above 0 and the alpha that keeps the scale, so that what is left computes what it did."""
        return self if rank == self.rank else replace(self, rank=rank, alpha=alpha_for(self.scale, rank, self.scale_rule))

    @property
    def shape_a(self) -> tuple[int, ...]:
        """The shape of A (table in core/math)."""
        if self.kind == "experts":
            return self.shape[0], self.rank, self.shape[2]
        if self.kind == "embedding":
            return self.rank, self.shape[0]
        return self.rank, *self.shape[1:]

    @property
    def shape_b(self) -> tuple[int, ...]:
        """The shape of B (table in core/math)."""
        if self.kind == "experts":
            return self.shape[0], self.shape[1], self.rank
        if self.kind == "embedding":
            return self.shape[1], self.rank
        return (self.shape[0], self.rank, 1, 1) if self.kind == "conv2d" else (self.shape[0], self.rank)

    @property
    def largest_rank(self) -> int:
        """min(in, out): above it a pair has more parameters than directions."""
        if self.kind == "experts":
            return min(self.shape[1:])
        return min(self.shape[0], math.prod(self.shape[1:]))

    @property
    def parameters(self) -> int:
        magnitude = self.shape[0] if self.variant == "dora" else 0
        return math.prod(self.shape_a) + math.prod(self.shape_b) + magnitude


@dataclass(frozen=True)
class ExtraEntry:
    """A module trained whole, or the new rows of an embedding."""

    path: str
    kind: Literal["module", "rows"]
    shape: tuple[int, ...]  # of all parameters together for a module: (count,); (rows, hidden) for rows
    tokens: tuple[str, ...] = ()  # the added tokens, for rows
    tied: str = ""  # path of the head that shares the rows

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelWeight:
    """A tensor of the model, whether it is trained or not: its kind in words, and why it has no pair."""

    path: str  # of the module, or of the parameter where the module has others
    group: str  # such as "attention"
    why_not: str = ""  # empty where it was chosen
    experts: int = 0  # that are stacked in it


@dataclass(frozen=True)
class Plan:
    """Everything that will be trained, in model order.

    `weights` are all tensors of the model, where `models/targets` made the plan; two plans are equal without them.
    """

    entries: tuple[PlanEntry, ...]
    extras: tuple[ExtraEntry, ...] = ()
    frozen_parameters: int = 0
    weights: tuple[ModelWeight, ...] = field(default=(), compare=False, repr=False)

    @property
    def parameters(self) -> int:
        return sum(entry.parameters for entry in self.entries) + sum(extra.parameters for extra in self.extras)

    def to_mapping(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; without the model's other weights, of which there may be thousands."""
        return {name: value for name, value in asdict(replace(self, weights=())).items() if name != "weights"}

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Table rows (path, shape, rank, scale, parameters); equal entries of several blocks share one: `layers.[0-29].…`."""
        grouped: dict[tuple[str, tuple[int, ...], int, float], list[PlanEntry]] = {}
        for entry in self.entries:
            name = ".".join("#" if part.isdigit() else part for part in entry.path.split("."))
            grouped.setdefault((name, entry.shape, entry.rank, entry.scale), []).append(entry)
        rows: list[tuple[str, str, str, str, str]] = []
        for (_, shape, rank, scale), same in grouped.items():
            count = sum(entry.parameters for entry in same)
            rows.append((path_range([entry.path for entry in same]), _times(shape), str(rank), f"{scale:g}", f"{count:,}"))
        for extra in self.extras:
            what = "new rows" if extra.kind == "rows" else "whole"
            rows.append((f"{extra.path} ({what})", _times(extra.shape), "", "", f"{extra.parameters:,}"))
        return rows

    def summary(self) -> str:
        """One line: how many pairs and parameters, and which share of the frozen model that is."""
        frozen = self.frozen_parameters
        share = f" ({percent(self.parameters / frozen, 2)} of {frozen:,})" if frozen else ""
        return f"{len(self.entries)} pairs, {len(self.extras)} extras, {self.parameters:,} trained parameters{share}"


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def path_range(paths: list[str]) -> str:
    """`a.0.b`, `a.1.b`, … as `a.[0-29].b`; several runs are joined by commas."""
    columns = list(zip(*(path.split(".") for path in paths), strict=True))
    return ".".join(column[0] if len(set(column)) == 1 else f"[{_runs(sorted({int(c) for c in column}))}]" for column in columns)


def _runs(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
