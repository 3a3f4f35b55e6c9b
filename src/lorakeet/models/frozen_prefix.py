"""Caches the output of the blocks below the lowest adapted one: for a row of ids it stays the same in a run.

    ids ──► block 0 … depth−1 ──► states, by the row's ids ──► block depth … n−1, in every later pass

For models whose blocks compute a row's states from its ids alone, without random numbers, and pass nothing else on
(models/text/cached_states checks that). Cached is the input of block `depth`, in the dtype of the model's states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.layers.linear import AdaptedLayer, BlockReplacement
from lorakeet.memory.spill import Spill
from lorakeet.models import modules


class FrozenPrefix:
    """The lowest `depth` of a model's blocks and the cached states of rows; `paths` are those of all blocks, in order."""

    def __init__(self, model: nn.Module, paths: Sequence[str], depth: int, cache: Spill) -> None:
        self.model, self.paths, self.depth, self.cache = model, list(paths), depth, cache
        self.bytes = 0
        self._returned: Tensor | None = None  # the input of block `depth`, while it comes from the cache
        self._recorded: list[Tensor] | None = None  # the inputs of block `depth`, while they are recorded
        for number, path in enumerate(self.paths):
            block = cast(nn.Module, modules.find(model, path))
            modules.replace(model, path, PrefixBlock(block, number, self))

    def close(self) -> None:
        """Restores the model's blocks and frees the cache."""
        for path in self.paths:
            block = modules.find(self.model, path)
            if isinstance(block, PrefixBlock):
                modules.replace(self.model, path, block.original)
        self.cache.close()

    def add(self, ids: Tensor, lengths: Sequence[int], states: Tensor) -> None:
        """Caches the states (tokens, hidden) of packed rows, ids (tokens,)."""
        for row, of_row in zip(_rows(ids, lengths), _rows(states, lengths), strict=True):
            if (key := _key(row)) not in self.cache:
                self.cache.put(key, of_row.detach().cpu().clone())
                self.bytes += of_row.nbytes

    def states_of(self, ids: Tensor, lengths: Sequence[int], prefix: int) -> Tensor | None:
        """Returns the cached states of packed rows, their first `prefix` tokens once; None if a row is not cached, or if a lower
        block uses an adapter."""
        keys = [_key(row) for row in _rows(ids, lengths)]
        if not all(key in self.cache for key in keys) or self.adapted:
            return None
        rows = [self.cache.rows(key) for key in keys]  # so that the shared prefix is read once
        return torch.cat([rows[0][:], *(row[prefix:] for row in rows[1:])])

    def contains(self, ids: Tensor) -> bool:
        """True if the states of the row with these `ids` are cached."""
        return _key(ids) in self.cache

    @property
    def adapted(self) -> bool:
        """True if a lower block uses an adapter."""
        below = (modules.find(self.model, path) for path in self.paths[: self.depth])
        return any(isinstance(part, AdaptedLayer) and part.in_use for block in below if block for part in block.modules())

    @contextmanager
    def returning(self, states: Tensor) -> Iterator[None]:
        """A context in which the lower blocks do not compute and the last of them returns `states` (1, tokens, hidden)."""
        self._returned = states
        try:
            yield
        finally:
            self._returned = None

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """A context in which no block from `depth` on computes; the list receives the inputs of block `depth`."""
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None

    def output_of(self, number: int, states: Tensor) -> Tensor | None:
        """Returns the output of block `number` if it is skipped; None if it has to compute."""
        if self._returned is not None and number < self.depth:
            return self._returned if number == self.depth - 1 else states
        if self._recorded is not None and number >= self.depth:
            if number == self.depth:
                self._recorded.append(states)
            return states
        return None


class PrefixBlock(BlockReplacement):
    """Wraps a decoder block that a pass may skip."""

    def __init__(self, original: nn.Module, number: int, prefix: FrozenPrefix) -> None:
        super().__init__(original)
        self._number, self.prefix = number, prefix

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        skipped = self.prefix.output_of(self._number, states)
        return self.original(states, *args, **kwargs) if skipped is None else skipped


def _rows(tokens: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split(tokens, list(lengths))


def _key(ids: Tensor) -> bytes:
    """A digest of a row's token ids: equal rows have equal states."""
    return hashlib.blake2b(ids.cpu().numpy().tobytes(), digest_size=16).digest()
