"""Truncated SVD of a dense change of a weight into a pair of A and B, for LyCORIS modules and for DoRA in formats without it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.dora import DoraPair
from lorakeet.core.math import Kind
from lorakeet.core.plan import PlanEntry
from lorakeet.errors import ConfigError
from lorakeet.formats.files.base_model import BaseModel


@dataclass(frozen=True)
class CompressionTarget:
    """Compress dense changes to `rank`, or to the smallest rank whose relative error is at most `error`."""

    rank: int | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"--rank is {self.rank}; expected a whole number of 1 or more.")
        if self.error is not None and not 0 <= self.error < 1:
            raise ConfigError(f"--error is {self.error}; expected a relative error from 0 to below 1, such as 0.01.")

    @property
    def given(self) -> bool:
        """True if a rank or an error is given."""
        return self.rank is not None or self.error is not None


def fit_pair(change: Tensor, compression: CompressionTarget) -> tuple[Pair, float]:
    """Returns the pair of scale 1 nearest to `change`, (out, in[, k, k]), and ‖change − B·A‖ / ‖change‖ (Frobenius).

    Eckart-Young: the leading singular vectors, with √σ in each factor. With both an error and a rank, the rank is a limit.
    """
    U, sigma, V = torch.linalg.svd(change.double().flatten(1), full_matrices=False)
    energy = sigma.square()
    tail = energy.flip(0).cumsum(0).flip(0)  # energy from this singular value on
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


def fold_dora(adapter: Adapter, base: BaseModel | None, compression: CompressionTarget, say: Callable[[str], None]) -> Adapter:
    """Replaces DoRA pairs by plain ones; `say` gets rank and relative error of each. Reads one weight at a time.

    ConfigError if a weight of the base is missing: ‖W + s·B·A‖ needs it.
    """
    dora = {path: pair for path, pair in adapter.pairs.items() if pair.magnitude is not None}
    missing = [path for path in dora if base is None or path not in base.weights]
    if base is None or missing:
        raise ConfigError(
            f"DoRA's magnitudes can only be folded with the weights of the base, which are missing for {', '.join(missing[:3])} "
            f"({len(missing)} modules). Name the folder of the base, with its safetensors files, with --base."
        )
    folded: dict[str, Pair] = {}
    for path, pair in dora.items():
        weight = base.weight(path)
        shape = (pair.B.shape[0], *pair.A.shape[1:])  # a Plan counts GPT-2's transposed weights as (out, in) too
        module = DoraPair(PlanEntry(path, pair.kind, shape, pair.rank, pair.alpha, pair.scale_rule, "dora"))
        module.load(pair)
        change = module.fold(weight).detach() - weight
        plain, error = fit_pair(change.t() if pair.kind == "conv1d" else change, compression)
        folded[path] = dataclasses.replace(plain, kind=pair.kind)
        say(f"{path}: DoRA folded into a plain pair of rank {plain.rank}, relative error {error:.2g}")
    return dataclasses.replace(adapter, pairs={**adapter.pairs, **folded})
