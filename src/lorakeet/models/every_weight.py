"""Every tensor of a model beside its Plan: of which kind it is, and why it has no pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lorakeet.core.plan import ModelWeight
from lorakeet.models import modules
from lorakeet.models.module_kinds import VECTORS, kind_in_words
from lorakeet.quant.stack import PackedStack


def every_weight(model: nn.Module, left_out: Mapping[str, str]) -> tuple[ModelWeight, ...]:
    """All parameters and packed weights of `model`, without adapters, in model order.

    `left_out` says by path why a module or a stack of experts has no pair; empty for one that was chosen. A weight that two
    modules share is there twice, since each of them can have a pair.
    """
    by_path = dict(modules.original_modules(model))
    return tuple(weight for path, module in by_path.items() for weight in _of_module(model, by_path, path, module, left_out))


def _of_module(
    model: nn.Module, by_path: Mapping[str, nn.Module], path: str, module: nn.Module, left_out: Mapping[str, str]
) -> Iterator[ModelWeight]:
    own: dict[str, Any] = dict(module.named_parameters(recurse=False))
    own |= {name: child for name, child in module.named_children() if isinstance(child, PackedStack)}
    stacks, adaptable = modules.expert_stacks(module), modules.kind_of(module) is not None
    if not own and not adaptable:
        return
    group = kind_in_words(model, by_path, path) if path else type(model).__name__
    if adaptable:
        yield ModelWeight(path, group, left_out.get(path, ""))
        own.pop("weight", None)
    for name, parameter in own.items():
        place = f"{path}.{name}" if path else name
        if name in stacks:
            yield ModelWeight(place, group, left_out.get(place, ""), len(parameter))
        elif parameter.dim() < 2 or name.endswith("bias"):  # those of stacked experts are a vector for each
            yield ModelWeight(place, VECTORS, "vectors have no pair")
        else:
            yield ModelWeight(place, group, f"no pair fits a {type(module).__name__}")
