"""The one place where W' = W + scale·B·A is written down; forward, merge, export, serving and tests call it.

Shapes used everywhere in Lorakeet (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685):

    kind        A                  B                 ΔW, in the frozen weight's own shape
    linear      (rank, in)         (out, rank)       (out, in)
    conv1d      (rank, in)         (out, rank)       (in, out): GPT-2 stores its weight transposed
    embedding   (rank, vocab)      (hidden, rank)    (vocab, hidden): the transposed product
    conv2d      (rank, in, k, k)   (out, rank, 1, 1) (out, in, k, k)
    experts     (E, rank, in)      (E, out, rank)    (E, out, in)
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["linear", "conv1d", "embedding", "conv2d", "experts"]
ScaleRule = Literal["alpha/rank", "alpha/sqrt(rank)"]


def scale_of(alpha: float, rank: int, rule: ScaleRule = "alpha/rank") -> float:
    """The factor before B·A: alpha/rank, or alpha/√rank for rsLoRA (https://arxiv.org/abs/2312.03732)."""
    return alpha / math.sqrt(rank) if rule == "alpha/sqrt(rank)" else alpha / rank


def alpha_for(scale: float, rank: int, rule: ScaleRule = "alpha/rank") -> float:
    """The alpha that gives `scale` at `rank`; the inverse of `scale_of`."""
    return scale * math.sqrt(rank) if rule == "alpha/sqrt(rank)" else scale * rank


def term_dims(kind: Kind) -> tuple[int, int]:
    """Along which dimension of A, and of B, the rank lies: there the rank-one terms b_i·a_iᵀ of B·A stand side by side."""
    return (1, 2) if kind == "experts" else (0, 1)


def delta(A: Tensor, B: Tensor, scale: float, kind: Kind = "linear") -> Tensor:
    """ΔW = scale·B·A in the shape of the frozen weight of that `kind` (table above)."""
    if kind == "experts":
        return torch.bmm(B, A).mul_(scale)
    product = torch.mm(B.flatten(1), A.flatten(1)).mul_(scale)
    if kind == "conv2d":
        return product.view(B.shape[0], *A.shape[1:])
    return product.t() if kind in ("conv1d", "embedding") else product


def fold(weight: Tensor, change: Tensor, *, in_change: bool = False) -> Tensor:
    """W + ΔW, summed in fp32 and rounded once to the weight's own dtype; `in_change`: in the memory of ΔW, where that is fp32.

    A ΔW that lies transposed is not written to, since W + ΔW would then lie so too, and who saves it would copy all of it; then
    W in fp32 is, where it is a copy.
    """
    wide, whole = change.float(), weight.float()
    copied = None if weight.dtype == torch.float32 else whole
    place = wide if wide.is_contiguous() else copied
    return torch.add(whole, wide, out=place if in_change else None).to(weight.dtype)


def add_low_rank(y: Tensor, shrunk: Tensor, B: Tensor, scale: float) -> Tensor:
    """Adds scale·(x·Aᵀ)·Bᵀ to `y` (tokens, out) in place, given `shrunk` = x·Aᵀ (tokens, rank)."""
    return y.addmm_(shrunk, B.t(), alpha=scale)


def shrink_grad(grad: Tensor, B: Tensor, scale: float) -> Tensor:
    """u = s·∂y·B (tokens, rank): what reaches the rank side; then ∂A = uᵀ·x and ∂x gains u·A."""
    return torch.mm(grad, B).mul_(scale)


def grad_of_b(grad: Tensor, shrunk: Tensor, scale: float) -> Tensor:
    """∂B = s·∂yᵀ·(x·Aᵀ) (out, rank), given `shrunk` = x·Aᵀ; computed as its transpose, which reads ∂y row by row."""
    return torch.mm(shrunk.t(), grad).mul_(scale).t().contiguous()
