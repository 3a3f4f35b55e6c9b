"""The pairs of each mix of adapters on all layers of a model as one copy, for tokens that kernels/cpu/c/pairs.c computes.

    copy of mix 1:   A B of layer 0 │ A B of layer 1 │ …          a token reads the copy of its mix, each layer its part;
    copy of mix 2:   A B of layer 0 │ …                            tokens of one mix read it together

A new mix is copied for all layers at once, in one call. Layer by layer, that took 20 ms of a step (docs/log). Where no kernel
adds copies (kernels/choose.inference_pairs), a core/batched/stack.PairStack does so for each group of layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lorakeet.core.batched.mixture import CopySource, Factors, Held, Mixture, factors_of, mixtures
from lorakeet.core.selection import PATIENCE, BatchAssignment, Mix, MixState, Selection
from lorakeet.kernels.cpu.inference_pairs import PairKind
from lorakeet.kernels.protocol import InferencePairs

LAYOUTS = 8  # cached


class _LayerPairs(NamedTuple):
    """A layer's pairs by adapter (as long as the layer lives), and the shape (out, in) of its weight."""

    adapters: weakref.ref[nn.ModuleDict]
    shape: tuple[int, int]


class _Part(NamedTuple):
    """The pairs of a mix on some layers, before they are copied."""

    mixtures: list[Mixture]
    factors: list[Factors]
    layout: Any  # the kernel's PairLayout
    special: int


class _Copy:
    """The copy of a mix on the first `layers` layers."""

    def __init__(self, what: MixState) -> None:
        self.what = what
        self.parts: list[CopySource] = []  # one for the layers that were known when the mix came, more for later ones
        self.memory: list[Tensor] = []
        self.at = torch.empty(0, 2, dtype=torch.int64)  # address and rank of each layer
        self.held = self.special = 0  # a bit for each layer: with a copied pair; with a special pair

    @property
    def layers(self) -> int:
        return len(self.at)

    @property
    def bytes(self) -> int:
        return sum(memory.nbytes for memory in self.memory)

    def stands_for(self, what: MixState) -> bool:
        return self.what == what and all(part.stands_for(what) for part in self.parts)

    def take(self, part: _Part, memory: Tensor) -> None:
        """Copies a part into `memory`."""
        part.layout.copy(part.factors, memory)
        self.held |= part.layout.held << self.layers
        self.special |= part.special << self.layers
        self.parts.append(CopySource.of(self.what, part.mixtures))
        self.memory.append(memory)
        self.at = torch.cat([self.at, part.layout.at(memory)])


class _InUse:
    """The addresses of the copies that an assignment uses; MixCopies alone keeps the copies alive."""

    def __init__(self, to: BatchAssignment, copies: Mapping[Mix, _Copy], stage: tuple[int, int], kernel: InferencePairs) -> None:
        self.stage = stage  # the change of adapters and of copies that it belongs to
        tokens: dict[int, list[int]] = {}
        for token, place in to.at:
            tokens.setdefault(place, []).append(token)
        for numbers, place in to.long:
            tokens.setdefault(place, []).extend(numbers)
        self.shares = kernel.Shares((own, copies[to.places[place]].at) for place, own in tokens.items())
        self.held = self.special = 0
        for copy in copies.values():
            self.held |= copy.held
            self.special |= copy.special


class MixCopies:
    """All copies of a selection's mixes, by mix. Layers are numbered when they first register.

    Unused copies stay while memory permits: all copies take at most what one batch needed. That limit is reset after PATIENCE
    batches in a row that needed less than half. Layers have addresses of copies, which are valid until the adapters or the
    division of the batch change.
    """

    def __init__(self, kernel: InferencePairs) -> None:
        """In the layout of `kernel`."""
        self.kernel, self.bytes = kernel, 0
        self._layers: list[_LayerPairs] = []
        self._numbers: weakref.WeakKeyDictionary[nn.ModuleDict, int] = weakref.WeakKeyDictionary()
        self._copies: dict[Mix, _Copy] = {}  # the most recently used last
        self._layouts: dict[tuple[int, int, tuple[PairKind, ...]], Any] = {}  # by the layers and their pairs
        self._version = 0  # rises when a copy is made, or a layer comes
        self._most = 0  # the most bytes that a batch needed
        self._oversized = 0  # batches in a row that needed less than half of the memory

    @classmethod
    def of(cls, selection: Selection, kernel: InferencePairs) -> MixCopies:
        """The copies of a selection in the layout of `kernel`."""
        if kernel not in selection.copies:
            selection.copies[kernel] = cls(kernel)
            selection.register(selection.copies[kernel])
        return cast(MixCopies, selection.copies[kernel])

    def number(self, adapters: nn.ModuleDict, shape: tuple[int, int]) -> int:
        """The number of the layer with these adapters."""
        found = self._numbers.get(adapters)
        if found is None:
            found = self._numbers[adapters] = len(self._layers)
            self._layers.append(_LayerPairs(weakref.ref(adapters), shape))
            self._version += 1
        return found

    def release(self) -> None:
        """Frees all copies."""
        self._copies.clear()
        self._version += 1
        self.bytes = self._most = self._oversized = 0

    def hold(self, to: BatchAssignment, selection: Selection) -> _InUse:
        """Copies each mix in use; an adapter without a pair on a layer adds nothing there.

        Copies what is missing, or was copied before an adapter was attached, detached or trained.
        """
        changes = selection.changes  # an adapter may be attached meanwhile: then this runs again
        found = cast("_InUse | None", to.picked.get(self))
        if found is not None and found.stage == (changes, self._version):
            return found
        wanted, kept = dict(selection.states(to).values()), {}
        spare: list[Tensor] = []
        for mix, attached_at in wanted.items():
            copy = self._copies.pop(mix, None)
            if copy is None or not copy.stands_for((mix, attached_at)):
                spare += [] if copy is None else copy.memory
                copy = _Copy((mix, attached_at))
            kept[mix] = copy
        try:
            self._complete(kept.values(), spare)
        finally:
            self._copies.update(kept)  # also if memory ran out: layers may have addresses of the others
            self.bytes = sum(copy.bytes for copy in self._copies.values())
        needed = sum(copy.bytes for copy in kept.values())
        self._oversized = self._oversized + 1 if 2 * needed < self.bytes else 0
        if self._oversized >= PATIENCE:
            self._copies, self.bytes, self._most, self._oversized = kept, needed, needed, 0
        found = to.picked[self] = _InUse(to, kept, (changes, self._version), self.kernel)
        return found

    def _complete(self, copies: Iterable[_Copy], spare: list[Tensor]) -> None:
        """Completes copies, in spare memory that fits; frees the oldest unused copies where memory would not suffice."""
        wanted = list(copies)
        new = [(copy, self._part(copy)) for copy in wanted if copy.layers < len(self._layers)]
        if not new:
            return
        self._version += 1
        needed = sum(copy.bytes for copy in wanted) + sum(part.layout.bytes for _, part in new)
        self._most = max(self._most, needed)
        held = needed + sum(copy.bytes for copy in self._copies.values())
        while held > self._most:
            gone = self._copies.pop(next(iter(self._copies)))
            held -= gone.bytes
            spare += gone.memory
        for copy, part in new:
            copy.take(part, _memory(part.layout.bytes, spare))

    def _part(self, copy: _Copy) -> _Part:
        """The pairs of a mix on those layers that its copy lacks."""
        mix, layers = copy.what[0], self._layers[copy.layers :]
        modules = [{} if (there := adapters()) is None else there._modules for adapters, _ in layers]
        own_of = mixtures(mix, cast(Held, modules))
        factors, kinds, special = list[Factors](), list[PairKind](), 0
        for number, (mixture, (_, shape)) in enumerate(zip(own_of, layers, strict=True)):
            if not mixture:
                continue
            own = factors_of(mixture)
            if not own:
                special |= 1 << number
            for A, B, scale in own:
                if A.shape[1:] != (shape[1],) or B.shape != (shape[0], len(A)):
                    raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are no pair for a weight of {shape}")
                a, b = self.kernel.as_readable(A), self.kernel.as_readable(B)
                factors.append((a, b, scale))
                kinds.append((number, a.size(0), a.dtype, b.dtype))
        return _Part(own_of, factors, self._layout(copy.layers, kinds), special)

    def _layout(self, first: int, kinds: Sequence[PairKind]) -> Any:
        """The layout on the layers from `first` on; shared by similar mixes while it is cached."""
        key = first, len(self._layers), tuple(kinds)
        if key not in self._layouts:
            while len(self._layouts) >= LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
            self._layouts[key] = self.kernel.PairLayout(kinds, [layer.shape for layer in self._layers[first:]])
        return self._layouts[key]


class MixRows:
    """The part of the copies for layers with the same input, which it adds to their outputs."""

    def __init__(
        self, layers: Sequence[tuple[nn.ModuleDict, tuple[int, int]]], selection: Selection, kernel: InferencePairs
    ) -> None:
        """For layers with these adapters, and weights of these shapes (out, in), which `kernel` takes."""
        self.empty = True  # whether no mix of the last assignment has a pair here
        self._copies = MixCopies.of(selection, kernel)
        self.numbers = [self._copies.number(adapters, shape) for adapters, shape in layers]  # the layers' numbers in the copies
        self.shares: Any = None  # the kernel's Shares of the last assignment
        self._rows = kernel.LayerRows([shape for _, shape in layers], self.numbers)
        self._bits = sum(1 << number for number in self.numbers)
        self._special = False

    def hold(self, to: BatchAssignment, selection: Selection) -> None:
        """Copies what the assignment uses, if needed."""
        found = self._copies.hold(to, selection)
        self.empty, self._special, self.shares = not found.held & self._bits, bool(found.special & self._bits), found.shares

    def meets_special(self, to: BatchAssignment) -> bool:
        """True if a mix of the last assignment has a special pair here."""
        return self._special

    def add(self, ys: Sequence[Tensor], x: Tensor, to: BatchAssignment) -> None:
        """Adds to each layer's y (tokens, out), in place, what the mixes give the tokens of `x` (tokens, in)."""
        if not self.empty and self.shares is not None:
            self._rows.add(ys, x, self.shares)


def _memory(count: int, spare: list[Tensor]) -> Tensor:
    for place, memory in enumerate(spare):
        if memory.nbytes == count:
            return spare.pop(place)
    return torch.empty(count, dtype=torch.uint8)
