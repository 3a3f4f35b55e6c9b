"""Computes every weight of a model with an adapter folded in, matrix by matrix: the reference for a merged model.

The weights of a streamed model are read from its store on access, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorakeet.core.layers.experts import ExpertPairs, stored_transposed
from lorakeet.core.layers.extras import TrainedModule, TrainedRows
from lorakeet.core.layers.linear import AdaptedLayer
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import delta, fold
from lorakeet.core.reordered import ReorderedLinear
from lorakeet.core.tiled_product import RowSource as RowsOf
from lorakeet.errors import ConfigError
from lorakeet.memory.store import WeightStore
from lorakeet.models.fuse import unfuse
from lorakeet.models.modules import adapted_layers, find, kind_of, original_modules, replace, unwrapped, weights_loaded
from lorakeet.models.streaming.model import StreamedEmbedding, StreamedHead
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.stack import PackedStack


def frozen_weights(model: nn.Module, store: WeightStore | None = None) -> Iterator[tuple[str, RowsOf]]:
    """Yields (path of the parameter, its values without adapters) for every parameter; packed ones in fp32.

    With the `store` of a streamed model, tensors on the meta device are read from there on access. An unpacked weight is valid
    until the next one is unpacked. A scalar becomes (1,).
    """
    for path, module in original_modules(model):
        if isinstance(module, PackedLinear):
            with weights_loaded(model, path), torch.no_grad():
                yield f"{path}.weight", module.weight
        if isinstance(module, ReorderedLinear):
            yield f"{path}.weight", module.weight
        if isinstance(module, PackedStack):
            with weights_loaded(model, path), torch.no_grad():
                yield path, _PackedMatrices(module)
        current = find(model, path)
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{leaf}" if path else leaf
            if isinstance(current, (StreamedEmbedding, StreamedHead)):
                yield full, current.rows
            elif store is not None and parameter.is_meta:
                yield full, store.rows(full) if parameter.dim() else _rows(store.tensor(full))
            else:
                yield full, _rows(parameter.detach())


def folded_weights(model: nn.Module, name: str | None, store: WeightStore | None = None) -> Iterator[tuple[str, RowsOf]]:
    """Yields (path of the parameter, W with adapter `name` folded in) for every parameter, in the form of `frozen_weights`.

    A weight that the adapter changes is computed whole, in memory; of a stack of experts, only those that are read.
    """
    changed: dict[str, tuple[nn.Module, str]] = {}
    across: set[str] = set()
    for path, layer in adapted_layers(model):
        if name is None or name not in layer.adapters:
            continue
        part = layer.adapters[name]
        leaves = list(part.keys()) if isinstance(part, ExpertPairs) else _leaves(layer, part)
        changed.update({f"{path}.{leaf}": (part, leaf) for leaf in leaves})
        if isinstance(part, ExpertPairs) and stored_transposed(layer.original):
            across |= {f"{path}.{leaf}" for leaf in leaves}
    for path, weight in frozen_weights(model, store):
        with torch.no_grad():
            yield path, _expected(weight, *changed[path], across=path in across) if path in changed else weight


def fold_layers(model: nn.Module, name: str, paths: Collection[str]) -> None:
    """Replaces each linear layer of `paths` by an nn.Linear with W in fp32 and the adapter `name` folded in.

    Other layers keep their adapters. Fused modules are removed, since they refer to the replaced layers.
    """
    unfuse(model)
    for path in paths:
        module = find(model, path)
        if module is None:
            raise ConfigError(f"The model has no layer '{path}', which is packed in the quantised file.")
        original = unwrapped(module)
        part = module.adapters[name] if isinstance(module, AdaptedLayer) and name in module.adapters else None
        with torch.no_grad():
            weight = cast(Tensor, original.weight).detach().float()
            weight = part.fold(weight) if isinstance(part, LoraPair) else weight
            weight = weight.t().contiguous() if kind_of(original) == "conv1d" else weight
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        bias = cast("Tensor | None", original.bias)
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        replace(model, path, linear)


def _leaves(layer: AdaptedLayer, part: nn.Module) -> list[str]:
    if isinstance(layer, TrainedModule):
        return [key for key, _ in part.named_parameters()]
    return ["weight", "bias"] if isinstance(part, LoraPair) and part.bias is not None else ["weight"]


def _expected(frozen: RowsOf, part: nn.Module, leaf: str, *, across: bool) -> RowsOf:
    if isinstance(part, ExpertPairs):
        return _FoldedExperts(frozen, cast(LoraPair, part[leaf]), across)
    if isinstance(part, LoraPair) and leaf == "bias" and part.bias is not None:
        return fold(frozen[:], part.scale * part.bias.detach())
    if isinstance(part, LoraPair):
        return part.fold(frozen[:])
    if isinstance(part, TrainedRows):
        return frozen[:].float().index_copy(0, part.ids, part.values.detach())
    return _rows(part.get_parameter(leaf).detach())


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() else tensor.view(1)


@dataclass(frozen=True)
class _PackedMatrices:
    """A packed stack as its parameter was, in fp32; those matrices are dequantised that are read."""

    stack: PackedStack

    @property
    def shape(self) -> tuple[int, ...]:
        count, *matrix = self.stack.shape
        return (count, *(matrix[::-1] if self.stack.transposed else matrix))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def __getitem__(self, part: slice) -> Tensor:
        found = torch.stack([self.stack.matrix(number).dense() for number in range(len(self.stack))[part]])
        return found.transpose(1, 2) if self.stack.transposed else found


@dataclass(frozen=True)
class _FoldedExperts:
    """A stack of experts (experts, out, in), or `across` (experts, in, out), with their pairs folded in, computed for the experts
    that are read.
    """

    frozen: RowsOf
    pair: LoraPair
    across: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.frozen.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.frozen.dtype

    @torch.no_grad()
    def __getitem__(self, part: slice) -> Tensor:
        weight = self.frozen[part]
        A, B = self.pair.factors()
        change = delta(A[part].float(), B[part].float(), self.pair.scale, "experts").to(weight.device)
        return fold(weight, change.transpose(1, 2) if self.across else change)
