"""A text model for serving: adapters can be attached and detached while it runs.

Layers are prepared for pairs once, so that a later adapter costs a check of its shapes and one table entry for each of its
pairs, without a walk over the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter, FlatPairs, FlatPairsLayout, Pair
from lorakeet.core.batched.frozen_pair import FrozenPair
from lorakeet.core.dora import DoraPair
from lorakeet.core.layers.experts import ExpertPairs, LoraExperts, stack_shape, why_not_experts
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
from lorakeet.models.inject import choices_at, experts_layer, selection_of, use_products
from lorakeet.models.text.model import TextModel
from lorakeet.quant.construct import base_of

LARGEST_COPY = 128 << 20  # bytes of a tied head up to which it gets a reordered copy: 16 tokens take 3.3 ms for 6.8 (SmolLM2)
_BYTES_OF_NOTES, _BYTES_OF_TARGET = 1 << 18, 1000  # in the header of a safetensors file
CACHED_FITS = 8  # adapter outlines whose check against the model is cached


@dataclass(frozen=True)
class _PairTarget:
    """A frozen weight that can have pairs: that of a linear layer, or the parameter `leaf` of a block of experts."""

    layer: LoraLinear | LoraExperts
    kind: Kind
    shape: tuple[int, ...]  # (out, in), or (experts, out, in)
    leaf: str = ""


class _PairSlot(NamedTuple):
    """The layer of a pair, and its settings."""

    layer: LoraLinear | LoraExperts
    pairs: dict[str, nn.Module]  # the layer's pairs by adapter: the plain dict inside its nn.ModuleDict, which is faster
    entry: PlanEntry
    scale: float
    leaf: str  # of experts: the parameter, by which the pairs of an adapter on a block are known

    def put(self, name: str, pair: LoraPair) -> None:
        """Puts the pair of the adapter `name` here."""
        if not self.leaf:
            self.pairs[name] = pair
            return
        if (block := self.pairs.get(name)) is None:
            block = self.pairs[name] = ExpertPairs()
        cast(ExpertPairs, block)[self.leaf] = pair

    def pair(self, name: str) -> LoraPair:
        """The pair of the adapter `name`."""
        held = self.pairs[name]
        return cast(LoraPair, cast(ExpertPairs, held)[self.leaf] if self.leaf else held)


@dataclass(frozen=True)
class _FittedAdapter:
    """An adapter that fits this model, without its numbers: the entries and slots of its pairs, in the same order."""

    entries: Mapping[str, PlanEntry]
    slots: tuple[_PairSlot, ...]
    bytes: int


class ServingModel:
    """A text model whose linear layers (but head and routers) and stacked experts have any number of adapters by name.

    `attach` and `detach` may run while another thread uses the model with other adapters. Adapters with pairs elsewhere, whole
    modules or token rows are refused: their rows could not share a batch with others.
    """

    def __init__(self, text: TextModel) -> None:
        self.text = text
        self._targets: dict[str, _PairTarget] = {}
        self._why_not: dict[str, str] = {}  # for each parameter of experts that cannot have a pair
        self._adapters: dict[str, _FittedAdapter] = {}
        self._fits: LruCache[FlatPairsLayout, _FittedAdapter] = LruCache(CACHED_FITS)
        model = text.model
        head = modules.output_layer(model)
        for path, module in list(modules.original_modules(model)):
            if stacks := modules.expert_stacks(module):
                self._prepare_experts(path, module, stacks)
                continue
            kind = modules.kind_of(module)
            if kind not in ("linear", "conv1d") or module is head or modules.is_router(model, path):
                continue
            current = modules.find(model, path)
            if isinstance(current, AdaptedLayer) and not isinstance(current, LoraLinear):
                continue
            layer = current if isinstance(current, LoraLinear) else LoraLinear(module, base_of(module, kind))
            if layer is not current:
                modules.replace(model, path, layer)
            self._targets[path] = _PairTarget(layer, kind, modules.weight_shape(module, kind))
        self.selection = selection_of(model)
        use_products(model, text.products)
        fuse(model)
        fuse_blocks(model, text.family)
        _reorder(text, [target.layer for target in self._targets.values() if isinstance(target.layer, LoraLinear)])
        release_free_memory()  # of the plain weights: 200 MB of SmolLM2
        model.eval()

    def _prepare_experts(self, path: str, module: nn.Module, stacks: Sequence[str]) -> None:
        """Wraps a block of experts for pairs on its parameters `stacks`, or records why they cannot have any."""
        current, reason = modules.find(self.text.model, path), why_not_experts(module)
        layer = current if isinstance(current, LoraExperts) else None
        if layer is None and not reason:
            try:
                layer = experts_layer(module, path, choices_at(self.text.model, path))
            except ConfigError as error:
                reason = str(error)
            else:
                modules.replace(self.text.model, path, layer)
        for leaf in stacks:
            if layer is None:
                self._why_not[f"{path}.{leaf}"] = f"part of a {type(module).__name__} whose experts cannot have pairs: {reason}"
            else:
                self._targets[f"{path}.{leaf}"] = _PairTarget(layer, "experts", stack_shape(module, leaf), leaf)

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

    @property
    def longest_header(self) -> int:
        """Bytes of the longest header of an adapter for this model: names, shapes and kinds of four tensors for each target."""
        return _BYTES_OF_NOTES + _BYTES_OF_TARGET * len(self._targets)

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
        if not adapter.pairs and not problems.errors:
            problems.add("It has no pairs.")
        problems.raise_if_any()
        targets = {path: self._targets[path] for path in entries}
        slots = tuple(
            _PairSlot(target.layer, target.layer.adapters._modules, entries[path], entries[path].scale, target.leaf)
            for path, target in targets.items()
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
        first = fit.slots[0]
        first.layer.adapters[name] = ExpertPairs() if first.leaf else pairs[0]  # torch checks the name, once
        for slot, pair in zip(fit.slots, pairs, strict=True):
            slot.put(name, pair)
        self.selection.changed(name)
        self._adapters[name] = fit

    def detach(self, name: str) -> None:
        """Removes the adapter; its memory is freed once nothing refers to it. Not while rows use it."""
        for slot in self._adapters.pop(name).slots:
            slot.pairs.pop(name, None)  # a block of experts has two slots
        self.selection.changed(name, gone=True)
        if self.selection.shares is None and self.selection.active == name:  # shares may belong to a step of another thread
            self.selection.use(None)

    def mixes(self, name: str) -> bool:
        """True if a weighted mix with this adapter is possible: all its pairs are plain LoRA."""
        return all(slot.pair(name).plain for slot in self._adapters[name].slots)

    def _entry(self, path: str, pair: Pair, problems: Problems) -> PlanEntry | None:
        target = self._targets.get(path)
        if target is None:
            near = "" if path in self._why_not else nearest(path, self._targets)
            reason = f"it is {self._why_not[path]}" if path in self._why_not else "or this base has no such module"
            problems.add(f"'{path}': a pair on it cannot be served, {reason.rstrip('.')}.{near}")
            return None
        if (pair.kind == "experts") != (target.kind == "experts") or pair.kind not in ("linear", "conv1d", "experts"):
            problems.add(f"'{path}': the pair is for a weight of kind {pair.kind}, but this one is {target.kind}.")
            return None
        if pair.kind == "experts" and (pair.magnitude is not None or pair.bias is not None):
            problems.add(f"'{path}': a pair on experts with a trained magnitude or a bias cannot be served.")
            return None
        return checked_entry(path, target.kind, target.shape, pair, problems.add)


_Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # A, B, magnitude, bias


def _parts(pairs: Mapping[str, Pair]) -> Iterable[_Parts]:
    if isinstance(pairs, FlatPairs):
        return pairs.parts()
    return ((pair.A, pair.B, pair.magnitude, pair.bias) for pair in pairs.values())


def _pair(slot: _PairSlot, parts: _Parts, device: torch.device) -> LoraPair:
    (A, B, magnitude, bias), entry, scale = parts, slot.entry, slot.scale
    if magnitude is None and bias is None:
        if not A.device == device == B.device:
            A, B = A.to(device), B.to(device)
        return FrozenPair(A, B, scale, entry.kind, entry.scale_rule)
    pair = (LoraPair if magnitude is None else DoraPair)(entry, device=device, bias=bias is not None)
    if isinstance(pair, DoraPair):
        pair.measure(cast(LoraLinear, slot.layer).base.dense())
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
