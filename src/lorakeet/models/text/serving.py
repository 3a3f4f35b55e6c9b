"""A text model for serving: adapters can be attached and detached while it runs.

Layers are prepared for pairs once, so that a later adapter costs a check of its shapes and one table entry for each of its
pairs, without a walk over the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter, FlatPairs, FlatPairsLayout, Pair
from lorakeet.core.batched.frozen_pair import FrozenPair
from lorakeet.core.dora import DoraPair
from lorakeet.core.layers.linear import AdaptedLayer, LoraLinear
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import Kind
from lorakeet.core.plan import PlanEntry
from lorakeet.core.reordered import ReorderedLinear, can_reorder
from lorakeet.errors import ConfigError, Problems, nearest
from lorakeet.formats.files.lru_cache import LruCache
from lorakeet.memory.allocator import release_free_memory
from lorakeet.models import modules
from lorakeet.models.fits import checked_entry
from lorakeet.models.fuse import fuse, fuse_blocks
from lorakeet.models.inject import selection_of, use_products
from lorakeet.models.kernels import use_kernels
from lorakeet.models.text.model import TextModel
from lorakeet.quant.construct import base_of

LARGEST_COPY = 128 << 20  # bytes of a tied head up to which it gets a reordered copy: 16 tokens take 3.3 ms for 6.8 (SmolLM2)
CACHED_FITS = 8  # adapter outlines whose check against the model is cached


@dataclass(frozen=True)
class _LinearTarget:
    """A frozen linear layer that can have pairs."""

    layer: LoraLinear
    kind: Kind
    shape: tuple[int, ...]  # (out, in)


class _PairSlot(NamedTuple):
    """The layer of a pair, and its settings."""

    layer: LoraLinear
    pairs: dict[str, nn.Module]  # the layer's pairs by adapter: the plain dict inside its nn.ModuleDict, which is faster
    entry: PlanEntry
    scale: float


@dataclass(frozen=True)
class _FittedAdapter:
    """An adapter that fits this model, without its numbers: the entries and slots of its pairs, in the same order."""

    entries: Mapping[str, PlanEntry]
    slots: tuple[_PairSlot, ...]
    bytes: int


class ServingModel:
    """A text model whose linear layers (but head and routers) have any number of adapters by name.

    `attach` and `detach` may run while another thread uses the model with other adapters. Adapters with pairs elsewhere, whole
    modules or token rows are refused: their rows could not share a batch with others.
    """

    def __init__(self, text: TextModel) -> None:
        self.text = text
        self._targets: dict[str, _LinearTarget] = {}
        self._adapters: dict[str, _FittedAdapter] = {}
        self._fits: LruCache[FlatPairsLayout, _FittedAdapter] = LruCache(CACHED_FITS)
        model = text.model
        head = modules.output_layer(model)
        for path, module in list(modules.original_modules(model)):
            kind = modules.kind_of(module)
            if kind not in ("linear", "conv1d") or module is head or modules.is_router(model, path):
                continue
            current = modules.find(model, path)
            if isinstance(current, AdaptedLayer) and not isinstance(current, LoraLinear):
                continue
            layer = current if isinstance(current, LoraLinear) else LoraLinear(module, base_of(module, kind))
            if layer is not current:
                modules.replace(model, path, layer)
            self._targets[path] = _LinearTarget(layer, kind, modules.weight_shape(module, kind))
        self.selection = selection_of(model)
        use_products(model, text.products)
        fuse(model)
        use_kernels(model, text.kernels)
        fuse_blocks(model, text.family)
        _reorder(text, [target.layer for target in self._targets.values()])
        release_free_memory()  # of the plain weights: 200 MB of SmolLM2
        model.eval()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters on the model."""
        return tuple(self._adapters)

    def bytes_of(self, name: str) -> int:
        """Returns the bytes of an adapter on the model, in fp32."""
        return self._adapters[name].bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of the copies of pairs that layers make for a batch (core/batched/stack)."""
        return self.selection.table_bytes

    def check(self, adapter: Adapter) -> Mapping[str, PlanEntry]:
        """Returns the entries of the pairs of `adapter`, whose tensors may be on the meta device.

        Raises ConfigError "The adapter cannot be served on this base" with every missing module, wrong shape or part.
        """
        return self._fit(adapter).entries

    def _fit(self, adapter: Adapter) -> _FittedAdapter:
        """Returns the slots of the pairs of `adapter`, cached for the last few outlines."""
        if not isinstance(adapter.pairs, FlatPairs) or adapter.extras or adapter.token_rows:
            return self._checked(adapter)
        return self._fits.get_or_make(adapter.pairs.outline, lambda: self._checked(adapter))

    def _checked(self, adapter: Adapter) -> _FittedAdapter:
        problems = Problems("The adapter cannot be served on this base")
        entries = {path: entry for path, pair in adapter.pairs.items() if (entry := self._entry(path, pair, problems))}
        advice = "Merge the adapter into its base (lorakeet merge) and serve that."
        for what, found in (("whole parameters", adapter.extras), ("token rows", adapter.token_rows)):
            if found:
                problems.add(f"It trains {what} ({', '.join(sorted(found)[:3])}), which cannot differ within a batch. {advice}")
        if not adapter.pairs and not problems.messages:
            problems.add("It has no pairs.")
        problems.raise_if_any()
        layers = {path: self._targets[path].layer for path in entries}
        slots = tuple(
            _PairSlot(layers[path], layers[path].adapters._modules, entry, entry.scale) for path, entry in entries.items()
        )
        return _FittedAdapter(MappingProxyType(entries), slots, 4 * adapter.parameters)

    def attach(self, name: str, adapter: Adapter) -> None:
        """Adds `adapter` under `name`, without copying its tensors.

        Raises ConfigError as `check` does, and if the name is taken.
        """
        fit = self._fit(adapter)
        if name in self._adapters:
            raise ConfigError(f"An adapter '{name}' is already on the model; detach it first.")
        device = self.text.device
        pairs = [_pair(slot, parts, device) for slot, parts in zip(fit.slots, _parts(adapter.pairs), strict=True)]
        fit.slots[0].layer.adapters[name] = pairs[0]  # torch checks the name, once and not hundreds of times
        for slot, pair in zip(fit.slots, pairs, strict=True):
            slot.pairs[name] = pair
        self.selection.changed(name)
        self._adapters[name] = fit

    def detach(self, name: str) -> None:
        """Removes the adapter; its memory is freed once nothing refers to it. Not while rows use it."""
        for slot in self._adapters.pop(name).slots:
            del slot.pairs[name]
        self.selection.changed(name, gone=True)
        if self.selection.shares is None and self.selection.active == name:  # shares may belong to a step of another thread
            self.selection.use(None)

    def mixes(self, name: str) -> bool:
        """True if a weighted mix with this adapter is possible: all its pairs are plain LoRA."""
        return all(cast(LoraPair, slot.pairs[name]).plain for slot in self._adapters[name].slots)

    def _entry(self, path: str, pair: Pair, problems: Problems) -> PlanEntry | None:
        target = self._targets.get(path)
        if target is None:
            near = nearest(path, self._targets)
            problems.add(f"'{path}': a pair on it cannot be served, or this base has no such module.{near}")
            return None
        entry = checked_entry(path, target.kind, target.shape, pair, problems.messages)
        if pair.kind not in ("linear", "conv1d"):
            problems.add(f"'{path}': the pair is for a weight of kind {pair.kind}, but this one is {target.kind}.")
        return entry


_Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # A, B, magnitude, bias


def _parts(pairs: Mapping[str, Pair]) -> Iterable[_Parts]:
    if isinstance(pairs, FlatPairs):
        return pairs.parts()
    return ((pair.A, pair.B, pair.magnitude, pair.bias) for pair in pairs.values())


def _pair(slot: _PairSlot, parts: _Parts, device: torch.device) -> LoraPair:
    (A, B, magnitude, bias), (entry, scale) = parts, slot[2:]
    if magnitude is None and bias is None:
        if not A.device == device == B.device:
            A, B = A.to(device), B.to(device)
        return FrozenPair(A, B, scale, entry.kind, entry.scale_rule)
    pair = (LoraPair if magnitude is None else DoraPair)(entry, device=device, bias=bias is not None)
    if isinstance(pair, DoraPair):
        pair.measure(slot.layer.base.dense())
    pair.load(Pair(A, B, entry.alpha, entry.kind, entry.scale_rule, magnitude, bias))
    return pair.requires_grad_(False).eval()


def _reorder(text: TextModel, layers: list[LoraLinear]) -> None:
    """Reorders the dense weights of the layers and the head for faster products (core/reordered), where possible.

    A head tied to the input embedding is then in memory twice, so only small ones are reordered.
    """
    for layer in layers:
        if type(layer.original) is nn.Linear and text.products == layer.weight.dtype and can_reorder(layer.weight):
            reordered = ReorderedLinear(layer.original)
            layer.original, layer.base = reordered, reordered.base
    head = modules.output_layer(text.model)
    if type(head) is not nn.Linear:
        return
    if head.weight is text.model.get_input_embeddings().weight and head.weight.nbytes > LARGEST_COPY:
        return
    if text.products == head.weight.dtype and can_reorder(head.weight):
        text.model.set_output_embeddings(ReorderedLinear(head))
