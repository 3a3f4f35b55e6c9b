"""A change ΔW as two thin factors: stacking several, and the best approximation of a given rank, from factors or from ΔW.

Everything here is (out, in) = B·A with B (out, rank), A (rank, in), on fp64 for the small parts. The best approximation of a
rank in the Frobenius norm keeps the largest singular values (Eckart and Young 1936).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_SVD = 768  # up to this smaller side a whole SVD of ΔW takes about a second; above it, a randomised one
OVERSAMPLING = 16  # directions beyond the rank, and rounds of the power iteration: Halko, Martinsson and Tropp (2011), §4.5
POWER_ROUNDS = 4


@dataclass(frozen=True)
class LowRank:
    """B·A, and what it leaves out: `error` = ‖ΔW − B·A‖ / ‖ΔW‖ and the squared norms behind it."""

    A: Tensor  # (rank, in), fp32
    B: Tensor  # (out, rank), fp32
    lost: float  # ‖ΔW − B·A‖²
    whole: float  # ‖ΔW‖²

    @property
    def error(self) -> float:
        return math.sqrt(self.lost / self.whole) if self.whole > 0 else 0.0


def stacked(parts: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """(A, B) of rank Σ ranks with B·A = Σ w·B_i·A_i exactly, from parts (A_i, B_i, w_i); the weight goes into B."""
    return torch.cat([A for A, _, _ in parts]), torch.cat([B * weight for _, B, weight in parts], dim=1)


def best_of_factors(A: Tensor, B: Tensor, rank: int) -> LowRank:
    """The best approximation of B·A of at most `rank`, without ever forming B·A.

    B = Q_B·R_B and Aᵀ = Q_A·R_A are thin QR decompositions; R_B·R_Aᵀ is a (rank, rank) core with the singular values of B·A.
    Each factor gets the square root of the singular values, so that neither is far larger than the other.
    """
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr(A.double().t())
    u, s, vh = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank(
        (root[:, None] * (vh[:rank] @ q_a.t())).float().contiguous(),
        ((q_b @ u[:, :rank]) * root).float().contiguous(),
        float(s[rank:].square().sum()),
        float(s.square().sum()),
    )


def best_of_matrix(change: Tensor, rank: int, seed: int) -> LowRank:
    """The best approximation of `change` (out, in) of at most `rank`: by a whole SVD where it is small, else a randomised one.

    The randomised one projects on a random sample of the range, sharpened by power iterations, and is within a fraction of a
    per cent of the best; its error is measured, not estimated.
    """
    change = change.float()
    rank = min(rank, *change.shape)
    if min(change.shape) <= max(EXACT_SVD, 2 * (rank + OVERSAMPLING)):
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        q = _range(change, rank + OVERSAMPLING, seed)
        small, s, vh = torch.linalg.svd(q.t() @ change, full_matrices=False)
        u = q @ small
    root = s[:rank].sqrt()
    A, B = (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
    left = torch.addmm(change, B, A, alpha=-1.0)
    return LowRank(A, B, float(left.double().square().sum()), float(change.double().square().sum()))


def _range(change: Tensor, width: int, seed: int) -> Tensor:
    """An orthonormal basis (out, width) of nearly all of the range of `change`."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(change.shape[1], width, generator=generator).to(change.device)
    q: Tensor = torch.linalg.qr(change @ sample)[0]
    for _ in range(POWER_ROUNDS):
        other = torch.linalg.qr(change.t() @ q)[0]
        q = torch.linalg.qr(change @ other)[0]
    return q
