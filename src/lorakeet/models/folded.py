"""What every weight of a model should be once an adapter is folded in: the yardstick for a merged model, matrix by matrix."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from lorakeet.core.experts import ExpertPairs
from lorakeet.core.extras import Rows, TrainedModule
from lorakeet.core.layers import AdaptedLayer
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import fold
from lorakeet.errors import ConfigError
from lorakeet.models.fuse import unfuse
from lorakeet.models.modules import adapted_layers, bare, find, kind_of, original_modules, replace
from lorakeet.quant.packed import PackedLinear


def folded_weights(model: nn.Module, name: str | None) -> Iterator[tuple[str, Tensor]]:
    """(path of the parameter, W with adapter `name` folded in) for every parameter, one at a time; packed ones in fp32."""
    changed: dict[str, tuple[nn.Module, str]] = {}
    for path, layer in adapted_layers(model):
        if name is None or name not in layer.adapters:
            continue
        held = layer.adapters[name]
        leaves = list(held.keys()) if isinstance(held, ExpertPairs) else _leaves(layer, held)
        changed.update({f"{path}.{leaf}": (held, leaf) for leaf in leaves})
    for path, module in original_modules(model):
        if isinstance(module, PackedLinear):
            full = f"{path}.weight"
            with torch.no_grad():
                yield full, _expected(module.weight, *changed[full]) if full in changed else module.weight
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{leaf}" if path else leaf
            with torch.no_grad():
                yield full, _expected(parameter.detach(), *changed[full]) if full in changed else parameter.detach()


def fold_layers(model: nn.Module, name: str, paths: Collection[str]) -> None:
    """Puts a plain nn.Linear with W in fp32, the adapter `name` folded in, in the place of each linear layer of `paths`.

    Other layers keep what they have; fused pieces are taken out, since they look into the layers that go.
    """
    unfuse(model)
    for path in paths:
        module = find(model, path)
        if module is None:
            raise ConfigError(f"The model has no layer '{path}', which is packed in the quantised file.")
        original = bare(module)
        held = module.adapters[name] if isinstance(module, AdaptedLayer) and name in module.adapters else None
        with torch.no_grad():
            weight = cast(Tensor, original.weight).detach().float()
            weight = held.fold(weight) if isinstance(held, LoraPair) else weight
            weight = weight.t().contiguous() if kind_of(original) == "conv1d" else weight
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        bias = cast("Tensor | None", original.bias)
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        replace(model, path, linear)


def _leaves(layer: AdaptedLayer, held: nn.Module) -> list[str]:
    if isinstance(layer, TrainedModule):
        return [key for key, _ in held.named_parameters()]
    return ["weight", "bias"] if isinstance(held, LoraPair) and held.bias is not None else ["weight"]


def _expected(weight: Tensor, held: nn.Module, leaf: str) -> Tensor:
    if isinstance(held, ExpertPairs):
        held = held[leaf]
    if isinstance(held, LoraPair) and leaf == "bias" and held.bias is not None:
        return fold(weight, held.scale * held.bias.detach())
    if isinstance(held, LoraPair):
        return held.fold(weight)
    if isinstance(held, Rows):
        return weight.float().index_copy(0, held.ids, held.values.detach())
    return held.get_parameter(leaf).detach()
