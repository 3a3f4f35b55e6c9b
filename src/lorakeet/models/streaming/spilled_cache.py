"""A KV cache in a scratch file, for generation with a streamed model: one block's keys and values are in memory at a time.

    block i computes its new keys and values ──► appended to the file ──► all of block i read, attended to, freed

Each token reads all of them once, beside the blocks themselves, which are far larger.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from lorakeet.memory.spill import Spill


def spilled_cache(config: Any, spill: Spill) -> DynamicCache:
    """Returns transformers' cache for a model of `config`, whose layers without a window spill to `spill`."""
    cache = DynamicCache(config=config)
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = _SpilledLayer(spill, number)
    return cache


class _SpilledLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values (rows, heads, tokens, width) of one block, appended piece by piece."""

    def __init__(self, spill: Spill, number: int) -> None:
        super().__init__()
        self._spill, self._number = spill, number
        self._pieces = self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends new keys and values and returns all."""
        self._length += key_states.shape[-2]
        return self._appended("keys", key_states), self._appended("values", value_states, last=True)

    def get_seq_length(self) -> int:
        return self._length

    def _appended(self, what: str, states: Tensor, *, last: bool = False) -> Tensor:
        whole = torch.cat([*(self._spill.get((self._number, what, piece)) for piece in range(self._pieces)), states], dim=-2)
        self._spill.put((self._number, what, self._pieces), states.contiguous())
        self._pieces += last
        return whole
