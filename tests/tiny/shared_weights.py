"""Copies of a model that share its weights, much cheaper than deep ones: for tests that wrap modules in hundreds of cases."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

_EACH = 50  # copies, after which all weights are compared; a write that torch counts is seen at once


class Shared:
    """A model of which `copy()` makes others with the same weights; a weight that was written into meanwhile is an error."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._weights = [(name, tensor, tensor.detach().clone()) for name, tensor in model.state_dict(keep_vars=True).items()]
        self._versions = [tensor._version for _, tensor, _ in self._weights]
        self._copies = 0

    def copy(self, *, own_weights: bool = False) -> Any:
        """Modules and configuration are new, so that layers can be replaced; parameters are those of the model, or copies."""
        self._copies += 1
        assert [tensor._version for _, tensor, _ in self._weights] == self._versions, "an earlier case wrote into the weights"
        for name, tensor, before in self._weights if self._copies % _EACH == 0 else ():
            assert torch.equal(tensor, before), f"an earlier case wrote into {name}"
        made: dict[int, Any] = {}
        if own_weights:
            for parameter in self.model.parameters():
                made[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        return _copy(self.model, made, copy.copy(getattr(self.model, "config", None)))


def _copy(module: nn.Module, made: dict[int, Any], config: Any) -> Any:
    if id(module) in made:
        return made[id(module)]
    new = made[id(module)] = type(module).__new__(type(module))
    own = new.__dict__
    own.update(module.__dict__)
    own["_buffers"] = module._buffers.copy()
    own["_parameters"] = {name: made.get(id(one), one) for name, one in module._parameters.items()}
    own["_modules"] = {name: None if one is None else _copy(one, made, config) for name, one in module._modules.items()}
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
        own[hooks] = own[hooks].copy()
    if "config" in own:
        own["config"] = config
    return new


def same_mlx(module: Any) -> Any:
    """The same for a model of mlx, whose modules are dictionaries; arrays are never written into."""
    import mlx.nn

    if isinstance(module, mlx.nn.Module):
        new = type(module).__new__(type(module))
        new.__dict__.update({name: copy.copy(value) if isinstance(value, set) else value for name, value in vars(module).items()})
        dict.update(new, {name: same_mlx(value) for name, value in module.items()})
        return new
    return [same_mlx(value) for value in module] if isinstance(module, list) else module
