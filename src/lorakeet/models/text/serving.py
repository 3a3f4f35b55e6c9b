"""A live model that adapters come to and leave while it runs: places for pairs are made once, so that nobody walks the model.

Loading a second or a thousandth adapter costs the same: a look at its shapes, and one entry in a table for each of its pairs.
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
from lorakeet.models.fuse import fuse, fuse_blocks
from lorakeet.models.inject import selection_of, use_products
from lorakeet.models.kernels import use_kernels
from lorakeet.models.text.model import TextModel
from lorakeet.quant.construct import base_of

TWICE = 128 << 20  # bytes that may be in memory twice for a head: 16 tokens through SmolLM2's take 3.3 ms so, and 6.8 otherwise
MOST_FITS = 8  # outlines of adapters whose look at the model is remembered


@dataclass(frozen=True)
class _LinearTarget:
    """A frozen linear weight that pairs can be put on."""

    layer: LoraLinear
    kind: Kind
    shape: tuple[int, ...]  # (out, in)


class _PairSlot(NamedTuple):
    """Where a pair goes, and what it is."""

    layer: LoraLinear
    held: dict[str, nn.Module]  # the layer's pairs by adapter; the plain dict, which nn.ModuleDict does not look up
    entry: PlanEntry
    scale: float


@dataclass(frozen=True)
class _FittedAdapter:
    """An adapter that fits this model, without its numbers: the entries and seats of its pairs, in one order."""

    entries: Mapping[str, PlanEntry]
    seats: tuple[_PairSlot, ...]
    bytes: int


class ServingModel:
    """A text model whose linear layers (the head and routers left out) hold any number of adapters by name.

    `attach` and `detach` may be called while another thread runs the model with other adapters. Adapters whose pairs lie
    elsewhere, or that train whole modules or token rows, are refused: their rows could not share a batch with others.
    """

    def __init__(self, text: TextModel) -> None:
        self.text = text
        self._places: dict[str, _LinearTarget] = {}
        self._held: dict[str, _FittedAdapter] = {}
        self._fits: LruCache[FlatPairsLayout, _FittedAdapter] = LruCache(MOST_FITS)
        model = text.model
        head = modules.output_layer(model)
        for path, module in list(modules.original_modules(model)):
            kind = modules.kind_of(module)
            if kind not in ("linear", "conv1d") or module is head or modules.is_router(model, path):
                continue
            standing = modules.find(model, path)
            if isinstance(standing, AdaptedLayer) and not isinstance(standing, LoraLinear):
                continue
            layer = standing if isinstance(standing, LoraLinear) else LoraLinear(module, base_of(module, kind))
            if layer is not standing:
                modules.replace(model, path, layer)
            self._places[path] = _LinearTarget(layer, kind, modules.weight_shape(module, kind))
        self.selection = selection_of(model)
        use_products(model, text.products)
        fuse(model)
        use_kernels(model, text.kernels)
        fuse_blocks(model, text.family)
        _reorder(text, [place.layer for place in self._places.values()])
        release_free_memory()  # where the plain weights were: 200 MB of SmolLM2's
        model.eval()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are on the model."""
        return tuple(self._held)

    def bytes_of(self, name: str) -> int:
        """What the numbers of an adapter on the model take, in fp32."""
        return self._held[name].bytes

    @property
    def table_bytes(self) -> int:
        """What the copies of pairs take that layers hold for the texts of a batch (core/batched/stack)."""
        return self.selection.table_bytes

    def check(self, adapter: Adapter) -> Mapping[str, PlanEntry]:
        """The entries of the pairs of `adapter`, whose tensors may lie on the meta device.

        ConfigError "The adapter cannot be served on this base" lists every missing module, wrong shape and homeless part.
        """
        return self._fit(adapter).entries

    def _fit(self, adapter: Adapter) -> _FittedAdapter:
        """Where the pairs of `adapter` go; looked at once for all adapters of one outline, while it is among the last few."""
        if not isinstance(adapter.pairs, FlatPairs) or adapter.extras or adapter.token_rows:
            return self._checked(adapter)
        return self._fits.of(adapter.pairs.outline, lambda: self._checked(adapter))

    def _checked(self, adapter: Adapter) -> _FittedAdapter:
        problems = Problems("The adapter cannot be served on this base")
        entries = {path: entry for path, pair in adapter.pairs.items() if (entry := self._entry(path, pair, problems))}
        advice = "Merge the adapter into its base (lorakeet merge) and serve that."
        for what, found in (("whole parameters", adapter.extras), ("token rows", adapter.token_rows)):
            if found:
                problems.add(f"It trains {what} ({', '.join(sorted(found)[:3])}), which cannot differ within a batch. {advice}")
        if not adapter.pairs and not problems.messages:
            problems.add("It holds no pair.")
        problems.raise_if_any()
        layers = {path: self._places[path].layer for path in entries}
        seats = tuple(
            _PairSlot(layers[path], layers[path].adapters._modules, entry, entry.scale) for path, entry in entries.items()
        )
        return _FittedAdapter(MappingProxyType(entries), seats, 4 * adapter.parameters)

    def attach(self, name: str, adapter: Adapter) -> None:
        """Puts `adapter` on the model under `name`; its tensors are taken as they are, without a copy.

        ConfigError as in `check`, and where the name is taken.
        """
        fit = self._fit(adapter)
        if name in self._held:
            raise ConfigError(f"An adapter '{name}' is already on the model; detach it first.")
        device = self.text.device
        pairs = [_pair(seat, parts, device) for seat, parts in zip(fit.seats, _parts(adapter.pairs), strict=True)]
        fit.seats[0].layer.adapters[name] = pairs[0]  # torch looks at the name, once and not hundreds of times
        for seat, pair in zip(fit.seats, pairs, strict=True):
            seat.held[name] = pair
        self.selection.changed(name)
        self._held[name] = fit

    def detach(self, name: str) -> None:
        """Takes the adapter off the model; its memory is free when nothing else refers to it. Not while rows use it."""
        for seat in self._held.pop(name).seats:
            del seat.held[name]
        self.selection.changed(name, gone=True)
        if self.selection.shares is None and self.selection.active == name:  # shares may belong to a step of another thread
            self.selection.use(None)

    def mixes(self, name: str) -> bool:
        """Whether a weighted mix with this adapter is possible: all its pairs are plain LoRA."""
        return all(cast(LoraPair, seat.held[name]).plain for seat in self._held[name].seats)

    def _entry(self, path: str, pair: Pair, problems: Problems) -> PlanEntry | None:
        place = self._places.get(path)
        if place is None:
            near = nearest(path, self._places)
            problems.add(f"'{path}': no pair can be served there, or this base has no such module.{near}")
            return None
        entry = PlanEntry(
            path, place.kind, place.shape, pair.rank, pair.alpha, pair.scale_rule, "lora" if pair.magnitude is None else "dora"
        )
        shapes = [("A", pair.A, entry.shape_a), ("B", pair.B, entry.shape_b)]
        for part, tensor, expected in shapes:
            if tuple(tensor.shape) != expected:
                problems.add(f"'{path}': {part} is {tuple(tensor.shape)}, but this base needs {expected}.")
        if pair.kind not in ("linear", "conv1d"):
            problems.add(f"'{path}': the pair is for a weight of kind {pair.kind}, but this one is {place.kind}.")
        for part, vector in (("magnitude", pair.magnitude), ("bias", pair.bias)):
            if vector is not None and tuple(vector.shape) != (place.shape[0],):
                problems.add(f"'{path}': {part} is {tuple(vector.shape)}, but this base needs ({place.shape[0]},).")
        return entry


_Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # A, B, magnitude, bias


def _parts(pairs: Mapping[str, Pair]) -> Iterable[_Parts]:
    if isinstance(pairs, FlatPairs):
        return pairs.parts()
    return ((pair.A, pair.B, pair.magnitude, pair.bias) for pair in pairs.values())


def _pair(seat: _PairSlot, parts: _Parts, device: torch.device) -> LoraPair:
    (A, B, magnitude, bias), (entry, scale) = parts, seat[2:]
    if magnitude is None and bias is None:
        if not A.device == device == B.device:
            A, B = A.to(device), B.to(device)
        return FrozenPair(A, B, scale, entry.kind, entry.scale_rule)
    pair = (LoraPair if magnitude is None else DoraPair)(entry, device=device, bias=bias is not None)
    if isinstance(pair, DoraPair):
        pair.measure(seat.layer.base.dense())
    pair.load(Pair(A, B, entry.alpha, entry.kind, entry.scale_rule, magnitude, bias))
    return pair.requires_grad_(False).eval()


def _reorder(text: TextModel, layers: list[LoraLinear]) -> None:
    """Brings the plain weights of the layers and of the head into the order in which they are multiplied, where there is one.

    A head which is the input embedding too is in memory twice then, so that only small ones are.
    """
    for layer in layers:
        if type(layer.original) is nn.Linear and text.products == layer.weight.dtype and can_reorder(layer.weight):
            standing = ReorderedLinear(layer.original)
            layer.original, layer.base = standing, standing.base
    head = modules.output_layer(text.model)
    if type(head) is not nn.Linear:
        return
    if head.weight is text.model.get_input_embeddings().weight and head.weight.nbytes > TWICE:
        return
    if text.products == head.weight.dtype and can_reorder(head.weight):
        text.model.set_output_embeddings(ReorderedLinear(head))
