"""Initial values of A and B. Every start leaves the model's function unchanged: exactly where B·A = 0, else to rounding.

The random numbers of a pair depend on the seed and its path alone, so that adding a layer does not change the others.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from lorakeet.core.lowrank import LoraPair
from lorakeet.core.spec import FACTORED, MEASURED

EXACT_SVD_UP_TO = 256  # smaller matrices get an exact SVD; larger ones the randomised one (Halko et al. 2011)
OVERSAMPLING = 16
POWER_ITERATIONS = 8


def initialise(pair: LoraPair, start: str, *, weight: Tensor, path: str, seed: int) -> None:
    """Initialises A and B of a new pair. `weight` is the frozen W as (out, in); only pissa and olora read it."""
    generator = torch.Generator().manual_seed(seed_for(seed, path))
    with torch.no_grad():
        if start in FACTORED:
            A, B = (leading_factors if start == "pissa" else _olora)(weight.float().cpu(), pair.A.shape[0], generator)
            # PiSSA: scale·B·A is the part that is cut out. OLoRA: B stays orthonormal, as in its authors' code.
            root = math.sqrt(pair.scale) if start == "pissa" else 1.0
            pair.A.copy_(A / root)
            pair.B.copy_(B / root)
            pair.anchor_A = pair.A.detach().clone()
            pair.anchor_B = pair.B.detach().clone()
        elif start in MEASURED:
            pair.A.zero_()  # with B = 0 nothing would be trained, which the check of the first steps' gradients would report
            pair.B.zero_()
        elif start == "orthogonal":
            for A, B in zip(pair.A, pair.B, strict=True) if pair.kind == "experts" else [(pair.A, pair.B)]:
                _orthogonal(A, B, generator)
        elif pair.kind == "embedding":
            pair.A.zero_()
            pair.B.copy_(torch.randn(pair.B.shape, generator=generator))
        elif start == "gaussian":
            pair.A.copy_(torch.randn(pair.A.shape, generator=generator) / pair.A.shape[-2 if pair.kind == "experts" else 0])
            pair.B.zero_()
        else:
            fan_in = math.prod(pair.A.shape[1:]) if pair.kind != "experts" else pair.A.shape[2]
            bound = 1 / math.sqrt(fan_in)  # Kaiming uniform with a = √5
            pair.A.copy_((torch.rand(pair.A.shape, generator=generator) * 2 - 1) * bound)
            pair.B.zero_()


def seed_for(seed: int, path: str) -> int:
    """A seed that depends on the run's seed and a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:7], "big")


def leading_factors(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A, B of the top `rank` singular triples of `weight` (out, in), split as B = U√S, A = √S·Vᵀ (PiSSA, arXiv 2404.02948).

    B·A is the best approximation of that rank; of large matrices nearly so, by a randomised SVD that draws from `generator`.
    """
    if min(weight.shape) <= max(EXACT_SVD_UP_TO, rank + OVERSAMPLING):
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        basis = weight @ torch.randn(weight.shape[1], rank + OVERSAMPLING, generator=generator)
        for _ in range(POWER_ITERATIONS):
            basis = weight @ (weight.t() @ torch.linalg.qr(basis).Q)
        Q = torch.linalg.qr(basis).Q
        U, S, Vh = torch.linalg.svd(Q.t() @ weight, full_matrices=False)
        U = Q @ U
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def _olora(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """W = Q·R; B = Q[:, :rank], A = R[:rank] (https://arxiv.org/abs/2406.01775).

    The first columns of Q are those of the first columns of W alone, and R = Qᵀ·W, so that neither Q nor R is ever whole.
    """
    del generator
    Q = torch.linalg.qr(weight[:, :rank]).Q
    return Q.t() @ weight, Q


def _orthogonal(A: Tensor, B: Tensor, generator: torch.Generator) -> None:
    """Sets A and B, both non-zero, so that B·A = 0: their rank sides are in two orthogonal halves of R^rank."""
    rank, flat_in, out = A.shape[0], math.prod(A.shape[1:]), B.shape[0]
    Q = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    left, right = Q[: rank // 2], Q[rank // 2 :]  # orthonormal rows, left·rightᵀ = 0
    A.copy_((left.t() @ torch.randn(rank // 2, flat_in, generator=generator) / math.sqrt(flat_in)).view(A.shape))
    B.copy_((torch.randn(out, rank // 2, generator=generator) @ right / math.sqrt(out)).view(B.shape))
