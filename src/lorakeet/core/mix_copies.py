"""The pairs of each mix of adapters on all layers of a model as one copy, for tokens that are computed by core/native/pairs.c.

        copy of mix 1:   A B of layer 0 │ A B of layer 1 │ …          a token reads the copy of its mix, each layer its part;
        copy of mix 2:   A B of layer 0 │ …                            tokens of one mix read it together

A mix that comes is copied for all layers at once: one look at its pairs, one call. Layer by layer, that took 20 ms of a step
(docs/log.md). Machines for which there is no pairs.c have a core/batched.Stack for each group of layers.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lorakeet.core.lowrank import LoraPair
from lorakeet.core.mixture import Copied, Factors, Mixture, factors_of, plain
from lorakeet.core.native import pair_rows
from lorakeet.core.native.pair_rows import Copying, LayerRows, Shares
from lorakeet.core.selection import PATIENCE, Arrangement, Mix, Selection, Standing


class _Layer(NamedTuple):
    """A layer's pairs by adapter, for as long as the layer is there, and the shape (out, in) of its weight."""

    adapters: weakref.ref[nn.ModuleDict]
    shape: tuple[int, int]


class _Part(NamedTuple):
    """The pairs of a mix on some layers, before they are copied: of each, with its rank when each pair's is filled up."""

    mixtures: list[Mixture]
    factors: list[list[Factors]]
    ranks: list[int]
    bytes: int


class _Copy:
    """Of a mix, on the first so many layers."""

    def __init__(self, what: Standing) -> None:
        self.what = what
        self.parts: list[Copied] = []  # one for the layers that were known when the mix came, more for those that came later
        self.memory: list[Tensor] = []
        self.layers = 0
        self.at = array("q")  # address and rank of each layer
        self.held = self.special = 0  # a bit for each layer: with a pair that is copied; with one that is more than A and B

    @property
    def bytes(self) -> int:
        return sum(memory.nbytes for memory in self.memory)

    def stands_for(self, what: Standing) -> bool:
        return self.what == what and all(part.stands_for(what) for part in self.parts)

    def look(self, layers: Sequence[_Layer]) -> _Part:
        """The mix's pairs on those of the `layers` that it is not copied for."""
        mix, found = self.what[0], _Part([], [], [], 0)
        total = 0
        for adapters, shape in layers[self.layers :]:
            there = adapters()
            held = {} if there is None else cast("Mapping[str, LoraPair]", there._modules)
            mixture = [(held[name], weight) for name, weight in mix if name in held]
            factors = factors_of(mixture) if mixture else []
            rank = sum(pair_rows.filled(A.shape[0]) for A, _, _ in factors)
            found.mixtures.append(mixture)
            found.factors.append(factors)
            found.ranks.append(rank)
            total += pair_rows.bytes_of(rank, shape)
        return found._replace(bytes=total)

    def take(self, part: _Part, layers: Sequence[_Layer], memory: Tensor, copying: Copying) -> None:
        """Has the part's pairs copied into `memory`."""
        self.parts.append(Copied.of(self.what, part.mixtures))
        self.memory.append(memory)
        address = memory.data_ptr()
        for mixture, factors, rank in zip(part.mixtures, part.factors, part.ranks, strict=True):
            shape, above = layers[self.layers].shape, 0
            for A, B, scale in factors:
                copying.add(A, B, scale, pair_rows.to_a(address, above, shape), pair_rows.to_b(address, above, rank, shape))
                above += pair_rows.filled(A.shape[0])
            self.at.extend((address, rank))
            bit = 1 << self.layers
            self.held |= bit if rank else 0
            self.special |= 0 if factors or plain(mixture) else bit
            address += pair_rows.bytes_of(rank, shape)
            self.layers += 1


class _Held:
    """The copies that an arrangement uses, and what of this the layers ask for."""

    def __init__(self, to: Arrangement, copies: Sequence[tuple[Mix, _Copy]], stage: tuple[int, int]) -> None:
        self.stage = stage  # after which change of adapters and of copies
        by_mix = dict(copies)
        self._copies = list(by_mix.values())  # as long as somebody has their addresses
        tokens: dict[int, list[int]] = {}
        for token, place in to.at:
            tokens.setdefault(place, []).append(token)
        for numbers, place in to.long:
            tokens.setdefault(place, []).extend(numbers)
        self.shares = Shares((own, by_mix[to.places[place]].at[:]) for place, own in tokens.items())
        self.held = self.special = 0
        for copy in self._copies:
            self.held |= copy.held
            self.special |= copy.special


class MixCopies:
    """All copies of a selection's mixes, by mix. Layers are known by numbers from when they first ask.

    What no batch uses stays while there is room: copies take as much as one batch needed, at most. What was needed is forgotten
    when PATIENCE batches in a row needed less than half.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._layers: list[_Layer] = []
        self._numbers: weakref.WeakKeyDictionary[nn.ModuleDict, int] = weakref.WeakKeyDictionary()
        self._copies: dict[Mix, _Copy] = {}  # the last ones used last
        self._version = 0  # rises when a copy is made, or a layer comes
        self._most = 0  # bytes that a batch needed
        self._roomy = 0  # batches in a row that needed less than half of what is held

    def __deepcopy__(self, memo: dict[int, object]) -> MixCopies:
        """Of other layers, which will ask."""
        return MixCopies()

    @classmethod
    def of(cls, selection: Selection) -> MixCopies:
        """The selection's own."""
        if selection.copies is None:
            selection.copies = cls()
            selection.holds(selection.copies)
        return cast(MixCopies, selection.copies)

    def number(self, adapters: nn.ModuleDict, shape: tuple[int, int]) -> int:
        """Of the layer that these are the adapters of."""
        found = self._numbers.get(adapters)
        if found is None:
            found = self._numbers[adapters] = len(self._layers)
            self._layers.append(_Layer(weakref.ref(adapters), shape))
            self._version += 1
        return found

    def release(self) -> None:
        """Forgets everything; what is held next is copied anew."""
        self._copies.clear()
        self._version += 1
        self.bytes = self._most = self._roomy = 0

    def hold(self, to: Arrangement, selection: Selection) -> _Held:
        """Has each mix that is used copied; an adapter without a pair on a layer adds nothing there.

        Copies what is not there, or was copied before an adapter came or left, or was trained since.
        """
        changes = selection.changes  # an adapter may come meanwhile: then this is looked at again
        found = cast("_Held | None", to.picked.get(self))
        if found is not None and found.stage == (changes, self._version):
            return found
        wanted, kept = dict(selection.standing(to).values()), {}
        spare: list[Tensor] = []
        for mix, comings in wanted.items():
            copy = self._copies.pop(mix, None)
            if copy is None or not copy.stands_for((mix, comings)):
                spare += [] if copy is None else copy.memory
                copy = _Copy((mix, comings))
            kept[mix] = copy
        try:
            self._complete(kept.values(), spare)
            self._copies.update(kept)
        finally:
            self.bytes = sum(copy.bytes for copy in self._copies.values())
        needed = sum(copy.bytes for copy in kept.values())
        self._roomy = self._roomy + 1 if 2 * needed < self.bytes else 0
        if self._roomy >= PATIENCE:
            self._copies, self.bytes, self._most, self._roomy = kept, needed, needed, 0
        held = to.picked[self] = _Held(to, list(kept.items()), (changes, self._version))
        return held

    def _complete(self, copies: Iterable[_Copy], spare: list[Tensor]) -> None:
        """Copies what these lack, into spare memory that fits. Copies that are not among them go, where need be: the oldest first."""
        wanted = list(copies)
        new = [(copy, copy.look(self._layers)) for copy in wanted if copy.layers < len(self._layers)]
        if not new:
            return
        self._version += 1
        needed = sum(copy.bytes for copy in wanted) + sum(part.bytes for _, part in new)
        self._most = max(self._most, needed)
        held = needed + sum(copy.bytes for copy in self._copies.values())
        while held > self._most:
            gone = self._copies.pop(next(iter(self._copies)))
            held -= gone.bytes
            spare += gone.memory
        copying = Copying()
        for copy, part in new:
            copy.take(part, self._layers, _memory(part.bytes, spare), copying)
        copying.run()


class MixRows:
    """What layers that see the same x have of the copies; it adds this to what they give."""

    def __init__(self, layers: Sequence[tuple[nn.ModuleDict, tuple[int, int]]], selection: Selection) -> None:
        """For layers with these adapters and weights of these shapes (out, in)."""
        self.empty = True  # whether no mix of the last arrangement has a pair here
        self._copies = MixCopies.of(selection)
        self.numbers = [self._copies.number(adapters, shape) for adapters, shape in layers]  # that the copies know the layers by
        self.shares: Shares | None = None  # of what is held
        self._rows = LayerRows([shape for _, shape in layers], self.numbers)
        self._bits = sum(1 << number for number in self.numbers)
        self._special = False

    def hold(self, to: Arrangement, selection: Selection) -> None:
        """Has what the arrangement uses copied, if nobody had yet."""
        held = self._copies.hold(to, selection)
        self.empty, self._special, self.shares = not held.held & self._bits, bool(held.special & self._bits), held.shares

    def meets_special(self, to: Arrangement) -> bool:
        """Whether a mix of the arrangement, which is held, has a pair here that is more than A and B."""
        return self._special

    def add(self, ys: Sequence[Tensor], x: Tensor, to: Arrangement) -> None:
        """Adds to each layer's y (tokens, out), in place, what the mixes give the tokens of `x` (tokens, in)."""
        if not self.empty and self.shares is not None:
            self._rows.add(ys, x, self.shares)


def _memory(count: int, spare: list[Tensor]) -> Tensor:
    for place, memory in enumerate(spare):
        if memory.nbytes == count:
            return spare.pop(place)
    return torch.empty(count, dtype=torch.uint8)
