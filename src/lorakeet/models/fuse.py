"""Puts the fused pieces of core/fused into a model, where they compute what the model's own modules compute."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.fused import ACTIVATIONS, FrozenRmsNorm, GatedMlp
from lorakeet.core.layers import StandIn
from lorakeet.models import modules

_PROBE_ROWS = 5
FUSED_TOLERANCE = 16  # in units of the dtype's rounding: the fused function rounds at other places


def fuse(model: nn.Module) -> int:
    """Lets stand-ins run the gated MLPs and RMSNorms, each first compared with its original on random input; returns how many.

    The stand-ins hold the originals, so that paths, weights and adapters stay as they are; `unfuse` takes them out.
    """
    count = 0
    for path, module in list(modules.original_modules(model)):
        standing = modules.find(model, path)
        if isinstance(standing, StandIn) or standing is None or not path:
            continue
        stand_in = _mlp(module) or _norm(module)
        if stand_in is not None:
            stand_in.train(module.training)
            modules.replace(model, path, stand_in)
            count += 1
    return count


def unfuse(model: nn.Module) -> None:
    """Takes every stand-in of `fuse` out again."""
    for path, module in list(modules.original_modules(model)):
        if isinstance(modules.find(model, path), (GatedMlp, FrozenRmsNorm)):
            modules.replace(model, path, module)


def _mlp(module: nn.Module) -> StandIn | None:
    children = {name for name, _ in module.named_children()}
    if not {"gate_proj", "up_proj", "down_proj"} <= children or children - {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    act = getattr(module, "act_fn", None)
    gate, up, down = (getattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))
    weight = cast(Tensor, gate.weight)
    x = _probe(weight.shape[1], weight)
    if act is None or x is None:
        return None
    with torch.no_grad():
        theirs = module(x)
        for name, activation in ACTIVATIONS.items():
            ours = down(activation.forward(gate(x)) * up(x))
            if torch.equal(ours, theirs):
                stand_in = GatedMlp(module, name)
                off = (stand_in(x).float() - theirs.float()).abs().max()  # the pairs begin at B·A = 0, or are given as they are
                return stand_in if off <= FUSED_TOLERANCE * torch.finfo(x.dtype).eps * theirs.float().abs().max() else None
    return None


def _norm(module: nn.Module) -> StandIn | None:
    own = dict(module.named_parameters())
    if set(own) != {"weight"} or not isinstance(getattr(module, "variance_epsilon", None), float) or own["weight"].requires_grad:
        return None
    x = _probe(own["weight"].shape[0], own["weight"])
    if x is None:
        return None
    stand_in = FrozenRmsNorm(module)
    with torch.no_grad():
        return stand_in if torch.equal(cast(Any, stand_in)(x), module(x)) else None


def _probe(width: int, like: Tensor) -> Tensor | None:
    """Random input (rows, width) in the dtype and on the device of a weight; None for a weight without numbers."""
    if like.is_meta or not like.is_floating_point():
        return None
    noise = torch.randn(_PROBE_ROWS, width, generator=torch.Generator().manual_seed(0))
    return noise.to(device=like.device, dtype=like.dtype)
