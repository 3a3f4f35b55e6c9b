"""Random adapters as plain values, for the modules of a given model. Rank 4, alpha 12, unless told otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakeet.core.adapter import Adapter, Pair


def random_pair(kind: str, weight: torch.Tensor, *, rank: int = 4, alpha: float = 12.0, dora: bool = False, **more: Any) -> Pair:
    """A pair with random A and B for `weight`; a DoRA magnitude is the rows' length, a little off."""
    shape = tuple(weight.shape)
    if kind == "experts":
        A, B = torch.randn(shape[0], rank, shape[2]), torch.randn(shape[0], shape[1], rank)
    elif kind in ("embedding", "conv1d"):
        A, B = torch.randn(rank, shape[0]), torch.randn(shape[1], rank)
    else:
        A, B = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
    magnitude = None
    if dora:
        rows = weight.t() if kind == "conv1d" else weight
        magnitude = rows.float().flatten(1).norm(dim=1) * (1 + 0.2 * torch.rand(rows.shape[0]))
    return Pair(A * 0.1, B * 0.1, alpha, kind, magnitude=magnitude, **more)  # type: ignore[arg-type]


def random_adapter(model: Any, *leaves: str, seed: int = 3, **options: Any) -> Adapter:
    """An adapter with a pair on every module, or 3-D parameter, whose name is one of `leaves` (all linear ones without)."""
    torch.manual_seed(seed)
    pairs: dict[str, Pair] = {}
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        kind = {nn.Linear: "linear", Conv1D: "conv1d", nn.Conv2d: "conv2d"}.get(type(module), "")
        kind = "embedding" if isinstance(module, nn.Embedding) else kind
        if kind and (leaf in leaves or (not leaves and kind in ("linear", "conv1d") and leaf != "lm_head")):
            pairs[path] = random_pair(kind, module.weight, **options)
        for name, parameter in module.named_parameters(recurse=False):
            if name in leaves and parameter.dim() == 3:
                pairs[f"{path}.{name}"] = random_pair("experts", parameter, **{**options, "dora": False})
    return Adapter(pairs, base="tiny")
