"""States that layers pass on from token to token, for each slot of a cache: the last inputs of a convolution, recurrent matrices.

The model's own code runs over a cache of transformers' layers. Before a pass each gets the states of the slots of its rows, and
after it they are stored again. All rows of a pass have equally many new tokens, so that no state sees padding. Keys and values of
the attention layers stay in tables by slot (models/generate/kv_cache).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionAndFullAttentionLayer

from lorakeet.models.text.row_masks import SLIDING, Masks, masks_of

KINDS = "conv", "recurrent"  # of states, as transformers names them
Table: TypeAlias = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]  # keys and values of a layer: KeyValues.layer


class RowsPass:
    """The slots of the rows of one pass, each with `count` new tokens after its `starts`; keys are seen up to `longest`."""

    def __init__(self, slots: Sequence[int], starts: Sequence[int], count: int, longest: int, device: torch.device) -> None:
        places, first = (torch.tensor(numbers, device=device) for numbers in (slots, starts))
        contiguous = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        self.index = slice(slots[0], slots[0] + len(slots)) if contiguous else places  # a slice makes no copy
        self.fresh = [slot for slot, start in zip(slots, starts, strict=True) if start == 0]
        self.positions = first[:, None] + torch.arange(count, device=device)  # (rows, count)
        self.longest = longest
        self._places = places[:, None]

    def attended(self, table: Table, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values (rows, kv heads, count, d) of a layer, and returns all (rows, kv heads, longest, d)."""
        tables = table(number, key[0].transpose(0, 1), value[0].transpose(0, 1))
        for states, added in zip(tables, (key, value), strict=True):
            states[self._places, :, self.positions] = added.transpose(1, 2).to(states.dtype)
        keys, values = (states[self.index, :, : self.longest] for states in tables)
        return keys, values

    def masks(self, window: int | None, dtype: torch.dtype) -> Masks:
        """For each kind of layer, what is added to the scores (rows, 1, count, longest): 0 for keys seen, −∞ for others."""
        distance = self.positions[:, None, :, None] - torch.arange(self.longest, device=self.positions.device)
        blank = torch.zeros(distance.shape, dtype=dtype, device=distance.device)
        full = blank.masked_fill(distance < 0, -math.inf)
        return masks_of(full) if window is None else masks_of(full) | {SLIDING: full.masked_fill(distance >= window, -math.inf)}


class _RowsLayer(LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer of transformers' cache for the rows of one pass: its states are lent, its keys and values are in tables."""

    def __init__(self, states: int, attended: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__(number_of_states=states)
        self._attended = attended

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows, the new ones included."""
        return self._attended(key_states, value_states)


class SlotStates:
    """The states of up to `slots` sequences, by layer, kind and number. They are allocated by the first pass."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._tables: dict[tuple[int, str, int], Tensor] = {}
        self._counts: list[int] = []  # of the states of a kind, for each layer

    def __bool__(self) -> bool:
        """Whether there are states: a prefix can then be reused only at its end, where they were stored."""
        return bool(self._tables)

    @property
    def bytes(self) -> int:
        """Bytes of the states of all slots."""
        return sum(table.nbytes for table in self._tables.values())

    def copy(self, source: int, target: int) -> None:
        """Copies the states of one slot to another."""
        for table in self._tables.values():
            table[target] = table[source]

    def wipe(self, slots: list[int]) -> None:
        """Zeroes the states of slots, as they are before the first token."""
        for table in self._tables.values() if slots else ():
            table[slots] = 0

    @contextmanager
    def lent(self, config: Any, rows: RowsPass, table: Table) -> Iterator[Cache]:
        """A context with transformers' cache for the rows of a pass. It stores their states, unless the pass fails."""
        self._counts = self._counts or [getattr(layer, "number_of_states", 1) for layer in DynamicCache(config=config).layers]
        layers = [_RowsLayer(count, partial(rows.attended, table, number)) for number, count in enumerate(self._counts)]
        self.wipe(rows.fresh)
        given = {place: states[rows.index] for place, states in self._tables.items()}
        for (number, kind, index), states in given.items():
            _give(layers[number], kind, index, states)
        yield Cache(layers=layers)
        for number, layer in enumerate(layers):
            for kind, index in product(KINDS, range(layer.number_of_states)):
                self._store((number, kind, index), getattr(layer, f"{kind}_states")[index], given, rows)

    def _store(
        self, place: tuple[int, str, int], found: Tensor | None, given: Mapping[tuple[int, str, int], Tensor], rows: RowsPass
    ) -> None:
        if found is None or (isinstance(rows.index, slice) and found is given.get(place)):  # changed where it is stored
            return
        if place not in self._tables:
            self._tables[place] = found.new_zeros(self._slots, *found.shape[1:])
        self._tables[place][rows.index] = found


def _give(layer: _RowsLayer, kind: str, index: int, states: Tensor) -> None:
    """Puts states into a layer of transformers' cache, as if an earlier pass had."""
    getattr(layer, f"{kind}_states")[index] = states
    getattr(layer, f"is_{kind}_states_initialized")[index] = True
    layer.has_previous_state[index] = True
    layer.device, layer.dtype = states.device, states.dtype
    if kind == "conv":
        layer.conv_kernel_size[index] = states.shape[-1]
