"""What the blocks below the lowest adapted one make of a row stays the same in a run: computed once, kept, and handed on.

    ids ──► block 0 … depth−1 ──► states, by the row's ids ──► block depth … n−1, in every later pass

For models whose blocks make the states of a row from its ids alone, without chance, and hand nothing else on
(models/text/hidden_states tries that). Kept is the input of block `depth`, in the dtype of the model's states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.layers.linear import AdaptedLayer, BlockReplacement
from lorakeet.memory.spill import Aside
from lorakeet.models import modules


class FrozenPrefix:
    """The lower `depth` of a model's blocks, at `paths` in their order, and what they made of the rows seen so far."""

    def __init__(self, model: nn.Module, paths: Sequence[str], depth: int, kept: Aside) -> None:
        self.model, self.paths, self.depth, self.kept = model, list(paths), depth, kept
        self.bytes = 0
        self._given: Tensor | None = None  # the input of block `depth`, while it is handed on
        self._found: list[Tensor] | None = None  # the inputs of block `depth`, while they are recorded
        for number, path in enumerate(self.paths):
            block = cast(nn.Module, modules.find(model, path))
            modules.replace(model, path, PrefixBlock(block, number, self))

    def close(self) -> None:
        """Puts the blocks back and forgets the states."""
        for path in self.paths:
            standing = modules.find(self.model, path)
            if isinstance(standing, PrefixBlock):
                modules.replace(self.model, path, standing.original)
        self.kept.close()

    def keep(self, ids: Tensor, lengths: Sequence[int], states: Tensor) -> None:
        """Keeps the states (tokens, hidden) of rows laid end to end, ids (tokens,)."""
        for row, of_row in zip(_rows(ids, lengths), _rows(states, lengths), strict=True):
            if (key := _key(row)) not in self.kept:
                self.kept.put(key, of_row.detach().cpu().clone())
                self.bytes += of_row.nbytes

    def states_of(self, ids: Tensor, lengths: Sequence[int], prefix: int) -> Tensor | None:
        """The kept states of whole rows laid end to end, their first `prefix` tokens once; None where a row is not kept, or where
        a block below has an adapter in use."""
        keys = [_key(row) for row in _rows(ids, lengths)]
        if not all(key in self.kept for key in keys) or self.adapted:
            return None
        rows = [self.kept.rows(key) for key in keys]  # of which the beginning is read once
        return torch.cat([rows[0][:], *(row[prefix:] for row in rows[1:])])

    def holds(self, ids: Tensor) -> bool:
        """Whether the states of the row with these `ids` are kept."""
        return _key(ids) in self.kept

    @property
    def adapted(self) -> bool:
        """Whether a block below has an adapter in use."""
        below = (modules.find(self.model, path) for path in self.paths[: self.depth])
        return any(isinstance(part, AdaptedLayer) and part.in_use for block in below if block for part in block.modules())

    @contextmanager
    def handing_on(self, states: Tensor) -> Iterator[None]:
        """A context in which no block below computes: `states` (1, tokens, hidden) are what the next one gets."""
        self._given = states
        try:
            yield
        finally:
            self._given = None

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """A context in which no block from `depth` on computes: the list then ends with what it would get."""
        self._found = []
        try:
            yield self._found
        finally:
            self._found = None

    def pass_through(self, number: int, states: Tensor) -> Tensor | None:
        """What block `number` gives without computing; None where it has to compute."""
        if self._given is not None and number < self.depth:
            return self._given if number == self.depth - 1 else states
        if self._found is not None and number >= self.depth:
            if number == self.depth:
                self._found.append(states)
            return states
        return None


class PrefixBlock(BlockReplacement):
    """Stands for a decoder block that may be left out of a pass."""

    def __init__(self, original: nn.Module, number: int, prefix: FrozenPrefix) -> None:
        super().__init__(original)
        self._number, self._prefix = number, prefix

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = self._prefix.pass_through(self._number, states)
        return self.original(states, *args, **kwargs) if found is None else found


def _rows(tokens: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split(tokens, list(lengths))


def _key(ids: Tensor) -> bytes:
    """A row by its token ids: equal rows have equal states."""
    return hashlib.blake2b(ids.cpu().numpy().tobytes(), digest_size=16).digest()
