"""The layout of adapters with equal configuration and header, computed once and shared.

A server loads hundreds of adapters that differ only in their numbers. For the first of them, the layout is parsed and checked:
which tensor is A or B of which layer, with which rank and scale. The others only fill in numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from lorakeet.core.adapter import Adapter, FlatPairs, FlatPairsLayout, Pair, Places
from lorakeet.formats.files.lru_cache import LruCache
from lorakeet.formats.files.safetensors_file import Header, SafeFile

Names = tuple[str, str, str, str]  # of the tensors A, B, magnitude and bias of a pair in a file


@dataclass(frozen=True)
class SharedLayout:
    """An adapter without its numbers."""

    outline: FlatPairsLayout
    base: str
    metadata: Mapping[str, str]

    def filled(self, file: SafeFile) -> Adapter | None:
        """The adapter with the numbers of `file`, whose header has this layout.

        None if its tensors must be read one by one: some number is not finite, or the dtypes differ.
        """
        numbers = file.numbers() if file.finite else None
        if numbers is None:
            return None
        return Adapter(FlatPairs(self.outline, numbers), base=self.base, metadata=dict(self.metadata))


def shared_layout_of(adapter: Adapter, header: Header, names: Mapping[str, Names]) -> SharedLayout | None:
    """The layout of an `adapter` read from a file with this `header`, in which the pairs have these `names`.

    None unless the adapter consists of exactly the tensors of the file, unchanged.
    """
    if adapter.extras or adapter.token_rows or not adapter.pairs or header.has_empty:
        return None
    places = {name: place for place, name in enumerate(header.order)}
    pairs: dict[str, Pair] = {}
    found: dict[str, Places] = {}
    for path, pair in adapter.pairs.items():
        tensors = (pair.A, pair.B, pair.magnitude, pair.bias)
        at = tuple(None if tensor is None else places.get(name) for name, tensor in zip(names[path], tensors, strict=True))
        for place, tensor in zip(at, tensors, strict=True):
            if tensor is not None and (place is None or tensor.shape != header.outline[place].shape):
                return None
        found[path] = cast(Places, at)
        A, B, magnitude, bias = (None if place is None else header.outline[place] for place in at)
        pairs[path] = replace(pair, A=cast(Tensor, A), B=cast(Tensor, B), magnitude=magnitude, bias=bias)
    used = [place for at in found.values() for place in at if place is not None]
    if sorted(used) != list(range(len(places))):
        return None
    outline = FlatPairsLayout(pairs, found, header.outline)
    return SharedLayout(outline, adapter.base, dict(adapter.metadata))


LAYOUTS: LruCache[tuple[bytes, Header], SharedLayout] = LruCache(8)  # by the bytes of the configuration, and the header
