"""Compares the effective ΔW of every pair of two adapters without forming it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair

LIMIT = 1e-6  # relative; fp32 products in another order differ by about 1e-7


@dataclass(frozen=True)
class AdapterDifference:
    """The largest relative difference of an effective ΔW, the path of that pair, and all other differences in words."""

    worst: float
    path: str
    problems: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return not self.problems and self.worst <= LIMIT


def compare_adapters(one: Adapter, two: Adapter) -> AdapterDifference:
    """Compares pairs by ‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖ (Frobenius, float64); magnitudes, biases and extras must be equal bit by bit.

    A pair that changes nothing may be missing in the other adapter.
    """
    problems: list[str] = []
    for path in sorted(one.pairs.keys() ^ two.pairs.keys()):
        pair = one.pairs[path] if path in one.pairs else two.pairs[path]
        if pair.magnitude is not None or pair.bias is not None or (bool(pair.B.any()) and bool(pair.A.any())):
            problems.append(f"{path} is in one of them only")
    worst, where = 0.0, ""
    for path in sorted(one.pairs.keys() & two.pairs.keys()):
        a, b = one.pairs[path], two.pairs[path]
        if a.weight_shape != b.weight_shape:
            problems.append(f"{path} is for a weight {a.weight_shape} in one and {b.weight_shape} in the other")
            continue
        if not _same(a.magnitude, b.magnitude) or not _same(a.bias, b.bias):
            problems.append(f"{path} has another magnitude or bias")
        difference = relative_difference(a, b)
        if difference > worst or not where:
            worst, where = difference, path
    for what, left, right in (("parameter", one.extras, two.extras), ("token rows", _rows(one), _rows(two))):
        for path in sorted(left.keys() | right.keys()):
            if path not in left or path not in right or not _same(left[path], right[path]):
                problems.append(f"the {what} {path} differ")
    return AdapterDifference(worst, where, tuple(problems))


def relative_difference(one: Pair, two: Pair) -> float:
    """‖s₁B₁A₁ − s₂B₂A₂‖ / ‖s₁B₁A₁‖ in float64, by QR of the stacked factors: no matrix of the weight's size is formed."""
    B1, A1 = _factors(one)
    B2, A2 = _factors(two)
    size = _norm(B1, A1)
    apart = _norm(torch.cat([B1, -B2], dim=-1), torch.cat([A1, A2], dim=-2))
    if size == 0:
        return 0.0 if apart == 0 else math.inf
    return apart / size


def _factors(pair: Pair) -> tuple[Tensor, Tensor]:
    """s·B and A in float64 as (…, out, rank) and (…, rank, in)."""
    if pair.kind == "experts":
        return pair.B.double() * pair.scale, pair.A.double()
    return pair.B.double().flatten(1) * pair.scale, pair.A.double().flatten(1)


def _norm(B: Tensor, A: Tensor) -> float:
    core_b, core_a = torch.linalg.qr(B).R, torch.linalg.qr(A.transpose(-1, -2)).R
    return float(torch.linalg.norm(core_b @ core_a.transpose(-1, -2)))


def _rows(adapter: Adapter) -> dict[str, Tensor]:
    return {path: rows.rows for path, rows in adapter.token_rows.items()}


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return one.shape == two.shape and torch.equal(one.float(), two.float())
