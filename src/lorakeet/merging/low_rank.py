"""Low-rank factors of a change ΔW: stacking several, and the best approximation of a given rank, from factors or from ΔW.

ΔW (out, in) = B·A with B (out, rank) and A (rank, in); small matrices are fp64. The best approximation of a rank in the Frobenius
norm keeps the largest singular values (Eckart and Young 1936).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.core.initialise import leading_factors


@dataclass(frozen=True)
class LowRank:
    """B·A, and its `error` = ‖ΔW − B·A‖ / ‖ΔW‖ with the squared norms."""

    A: Tensor  # (rank, in), fp32
    B: Tensor  # (out, rank), fp32
    lost: float  # ‖ΔW − B·A‖²
    whole: float  # ‖ΔW‖²

    @property
    def error(self) -> float:
        return math.sqrt(self.lost / self.whole) if self.whole > 0 else 0.0


def stack_factors(parts: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """(A, B) of rank Σ ranks with B·A = Σ w·B_i·A_i exactly, from parts (A_i, B_i, w_i); weights are multiplied into B."""
    return torch.cat([A for A, _, _ in parts]), torch.cat([B * weight for _, B, weight in parts], dim=1)


def truncate_factors(A: Tensor, B: Tensor, rank: int) -> LowRank:
    """The best approximation of B·A of at most `rank`, without forming B·A.

    B = Q_B·R_B and Aᵀ = Q_A·R_A are thin QR decompositions; R_B·R_Aᵀ is a (rank, rank) core with the singular values of B·A.
    Each factor gets the square root of the singular values, so that their norms are similar.
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


def truncate_matrix(change: Tensor, rank: int, seed: int) -> LowRank:
    """The best approximation of `change` (out, in) of at most `rank`; nearly the best for large matrices (core/initialise).

    The error is measured on the result.
    """
    change = change.float()
    A, B = leading_factors(change, min(rank, *change.shape), torch.Generator().manual_seed(seed))
    A, B = A.contiguous(), B.contiguous()
    left = torch.addmm(change, B, A, alpha=-1.0)
    return LowRank(A, B, float(left.double().square().sum()), float(change.double().square().sum()))
