"""A dense change of a weight made into a pair: the best A and B of a rank (SVD), with the error that this costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.core.adapter import Pair
from lorakeet.core.math import Kind
from lorakeet.errors import ConfigError


@dataclass(frozen=True)
class Compression:
    """How far dense changes are compressed: to `rank`, or to the smallest rank whose relative error is at most `error`."""

    rank: int | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"--rank is {self.rank}; expected a whole number of 1 or more.")
        if self.error is not None and not 0 <= self.error < 1:
            raise ConfigError(f"--error is {self.error}; expected a relative error from 0 to below 1, such as 0.01.")

    @property
    def asked(self) -> bool:
        return self.rank is not None or self.error is not None


def fit_pair(change: Tensor, compression: Compression) -> tuple[Pair, float]:
    """The pair of scale 1 nearest to `change`, (out, in) or (out, in, k, k), and ‖change − B·A‖ / ‖change‖ (Frobenius).

    Eckart-Young: the leading singular vectors, √σ on either side. Where both are set, the rank is a limit.
    """
    U, sigma, V = torch.linalg.svd(change.double().flatten(1), full_matrices=False)
    energy = sigma.square()
    tail = energy.flip(0).cumsum(0).flip(0)  # energy of the values from this one on
    total = float(tail[0])
    rank = sigma.numel()
    if compression.error is not None:
        within = (tail <= compression.error**2 * total).nonzero()
        rank = max(1, int(within[0])) if within.numel() else rank
    if compression.rank is not None:
        rank = min(rank, compression.rank)
    root = sigma[:rank].sqrt()
    A = (root[:, None] * V[:rank]).float().reshape(rank, *change.shape[1:])
    B = (U[:, :rank] * root).float().reshape(change.shape[0], rank, *[1] * (change.dim() - 2))
    lost = float(tail[rank]) if rank < sigma.numel() else 0.0
    kind: Kind = "conv2d" if change.dim() == 4 else "linear"
    return Pair(A.contiguous(), B.contiguous(), float(rank), kind), math.sqrt(lost / total) if total else 0.0
