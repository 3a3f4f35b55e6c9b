"""The literal meaning of an adapter: its changes written into the weights of a model, in fp32. The oracle of many tests.

It knows nothing of `merge`, and uses no code of `core` but the shapes' table: every formula is spelt out here once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter, Pair


def change(pair: Pair) -> Tensor:
    """scale·B·A in the shape of the frozen weight."""
    scale = pair.alpha / (pair.rank**0.5 if pair.scale_rule == "alpha/sqrt(rank)" else pair.rank)
    A, B = pair.A.double(), pair.B.double()
    if pair.kind == "experts":
        return scale * torch.einsum("eor,eri->eoi", B, A)
    if pair.kind == "conv2d":
        return scale * torch.einsum("or,rihw->oihw", B[:, :, 0, 0], A)
    product = scale * B @ A
    return product.T if pair.kind in ("conv1d", "embedding") else product


def folded(weight: Tensor, pair: Pair) -> Tensor:
    """The weight that the pair makes of `weight`, in fp64."""
    full = weight.double() + change(pair)
    if pair.magnitude is None:
        return full
    rows = full.T if pair.kind == "conv1d" else full
    length = rows.flatten(1).norm(dim=1)
    gain = (pair.magnitude.double() / length).view(-1, *[1] * (rows.dim() - 1))
    return (rows * gain).T if pair.kind == "conv1d" else rows * gain


def fold_into(model: Any, adapter: Adapter) -> Any:
    """Writes `adapter` into `model` (changed in place) and returns it."""
    with torch.no_grad():
        for path, tensor in adapter.extras.items():
            _untie(model, path)
            model.get_parameter(path).data = tensor.clone()
        for path, rows in adapter.token_rows.items():
            model.get_submodule(path).weight[torch.tensor(rows.ids)] = rows.rows
        for path, pair in adapter.pairs.items():
            if pair.kind == "experts":
                parameter = model.get_parameter(path)
                parameter.data = folded(parameter, pair).to(parameter.dtype)
                continue
            module = model.get_submodule(path)
            _untie(model, f"{path}.weight")
            module.weight.data = folded(module.weight, pair).to(module.weight.dtype)
            if pair.bias is not None:
                old = 0 if module.bias is None else module.bias.data
                module.bias = nn.Parameter(old + pair.bias * pair.scale)
    return model


def _untie(model: Any, path: str) -> None:
    """Gives the parameter at `path` memory of its own, so that its twin keeps the old values."""
    module, _, name = path.rpartition(".")
    owner = model.get_submodule(module)
    setattr(owner, name, nn.Parameter(getattr(owner, name).detach().clone(), requires_grad=False))
