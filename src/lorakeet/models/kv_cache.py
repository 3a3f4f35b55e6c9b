"""Generation a step at a time: rows of different lengths in one pass, each with its own place in a bounded key-value cache.

A step takes any rows together: prompts (many tokens), prompts whose beginning is cached already, and rows that write one token.
They are laid end to end as in training, so there is no padding; single tokens of all rows are attended in one product.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakeet.core.device import is_cpu
from lorakeet.core.row_attention import QUERIES
from lorakeet.core.selection import Selection, Share
from lorakeet.errors import ConfigError
from lorakeet.models.text import TextModel


@dataclass(frozen=True)
class Row:
    """What a step adds to one sequence: `ids` follow the `start` tokens that its `slot` of the cache holds.

    `adapters` are the adapters that these tokens use, with weights; empty for the bare base.
    """

    slot: int
    start: int
    ids: tuple[int, ...]
    adapters: Mapping[str, float]


class KeyValues:
    """Keys and values of up to `slots` sequences of up to `capacity` tokens. Pages of memory count when they are written."""

    def __init__(self, *, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (slots, kv heads, capacity, d) of a layer; made like `key` and `value` (1, kv heads, n, d)."""
        if number not in self._layers:
            shapes = [(self.slots, states.shape[1], self.capacity, states.shape[3]) for states in (key, value)]
            self._layers[number] = (_zeros(shapes[0], key), _zeros(shapes[1], value))
        return self._layers[number]

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """The first `count` tokens of one sequence become those of another."""
        for key, value in self._layers.values():
            key[target, :, :count] = key[source, :, :count]
            value[target, :, :count] = value[source, :, :count]

    @property
    def bytes(self) -> int:
        """What the cache takes when every slot is full."""
        return sum(states.numel() * states.element_size() for layer in self._layers.values() for states in layer)


class Pass:
    """The attention of one step over the cache; what `row_attention` is handed as `row_cache`."""

    def __init__(self, cache: KeyValues, rows: Sequence[Row]) -> None:
        self.cache, self.rows = cache, tuple(rows)
        places, place = [], 0
        for row in rows:
            places.append(place)
            place += len(row.ids)
        self._prompts = [(row, at) for row, at in zip(rows, places, strict=True) if len(row.ids) > 1]
        single = [(row, at) for row, at in zip(rows, places, strict=True) if len(row.ids) == 1]
        self._single = [row for row, _ in single]
        self._single_at = torch.tensor([at for _, at in single], dtype=torch.int64)
        self._single_slots = torch.tensor([row.slot for row, _ in single], dtype=torch.int64)
        self._single_ends = torch.tensor([row.start for row, _ in single], dtype=torch.int64)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, cap: float | None = None
    ) -> Tensor:
        """q (1, heads, tokens, d), k and v (1, kv heads, tokens, d) of the new tokens to (1, tokens, heads, d)."""
        keys, values = self.cache.layer(layer, k, v)
        out = torch.empty(1, q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
        for row, at in self._prompts:
            count = len(row.ids)
            end = row.start + count
            keys[row.slot, :, row.start : end] = k[0, :, at : at + count]
            values[row.slot, :, row.start : end] = v[0, :, at : at + count]
            for first in range(0, count, QUERIES):
                last = min(first + QUERIES, count)
                seen = row.start + last
                part = slice(at + first, at + last)
                states = _stacked(q[0, :, part], k.shape[1])[None]
                found = _attention(
                    states, keys[row.slot, None, :, :seen], values[row.slot, None, :, :seen],
                    _allowed(row.start + first, last - first, seen, window, q.device), scale, cap,
                )  # fmt: skip
                out[0, part] = found[0].view(q.shape[1], last - first, -1).transpose(0, 1)
        if self._single:
            found = self._attend_single(q, (k, v), (keys, values), scale=scale, window=window, cap=cap)
            out[0, self._single_at] = found
        return out

    def _attend_single(
        self,
        q: Tensor,
        new: tuple[Tensor, Tensor],
        held: tuple[Tensor, Tensor],
        *,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        """The rows that have one new token, together: (rows, heads, d)."""
        slots, ends, at = self._single_slots, self._single_ends, self._single_at
        for states, added in zip(held, new, strict=True):
            states[slots, :, ends] = added[0, :, at].transpose(0, 1)
        longest = int(ends.max()) + 1
        first, last = int(slots.min()), int(slots.max()) + 1
        if torch.equal(slots, torch.arange(first, last)):  # neighbours: seen where they lie, without a copy
            keys, values = (states[first:last, :, :longest] for states in held)
        else:
            keys, values = (states[slots, :, :longest] for states in held)
        queries = q[0, :, at].transpose(0, 1).reshape(len(slots), new[0].shape[1], -1, q.shape[3])  # (rows, kv, G, d)
        distance = ends[:, None] - torch.arange(longest)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        found = _attention(queries, keys, values, seen[:, None, None, :].to(q.device), scale, cap)
        return found.reshape(len(slots), q.shape[1], -1)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros that take no memory until they are written, where the system hands out pages so.

    A shorter row beside a longer one multiplies values past its own end by 0, which must be numbers: memory as it comes may hold
    a NaN, and 0·NaN is NaN.
    """
    size = math.prod(shape) * like.element_size()
    if not is_cpu(like.device) or size == 0:
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


def _stacked(states: Tensor, kv: int) -> Tensor:
    """(kv·G, n, d) as (kv, G·n, d): the queries of a group one below the other."""
    return states.reshape(kv, -1, states.shape[2])


def _allowed(start: int, count: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `seen` keys the queries start … start + count − 1 may look at: (1, 1, 1, count, seen)."""
    distance = torch.arange(start, start + count, device=device)[:, None] - torch.arange(seen, device=device)
    allowed = distance >= 0
    return (allowed if window is None else allowed & (distance < window))[None, None, None]


def _attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, cap: float | None) -> Tensor:
    """q (rows, kv, G·n, d), k and v (rows, kv, m, d): softmax(scale·q·kᵀ) over the allowed keys, times v. Softmax in fp32."""
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if allowed.dim() == 5:  # (1, 1, 1, n, m) for each of the G queries of a group
        grouped = scores.view(*scores.shape[:2], -1, *allowed.shape[-2:])
        scores = grouped.masked_fill(~allowed, float("-inf")).view(scores.shape)
    else:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


def step(text: TextModel, cache: KeyValues, rows: Sequence[Row], selection: Selection | None = None) -> Tensor:
    """Adds the new tokens of `rows` to the cache and returns the logits after each row's last one, (rows, vocabulary) in fp32.

    `selection` is the model's (models/inject.selection_of), needed where rows use adapters. Raises ConfigError where the model
    does not run with row attention, ValueError for a row that is longer than the cache.
    """
    if text.attention != "varlen":
        raise ConfigError(f"Generating in batches needs model.attention varlen; this model runs with {text.attention}.")
    for row in rows:
        if not row.ids or row.start + len(row.ids) > cache.capacity or not 0 <= row.slot < cache.slots:
            raise ValueError(f"{len(row.ids)} tokens after {row.start} in slot {row.slot} do not fit the cache")
    lengths = tuple(len(row.ids) for row in rows)
    ids = torch.tensor([number for row in rows for number in row.ids], device=text.device)
    positions = torch.cat([torch.arange(row.start, row.start + len(row.ids)) for row in rows]).to(text.device)
    if selection is not None:
        selection.divide(shares_of(rows), units=len(ids))
    with torch.no_grad():
        output: Any = text.model.get_decoder()(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], position_ids=positions[None], use_cache=False,
            row_lengths=lengths, row_products=text.products, row_cache=Pass(cache, rows),
        )  # fmt: skip
        last = torch.tensor(lengths).cumsum(0).sub(1).to(text.device)
        return text.head(output.last_hidden_state[0, last]).float()


def shares_of(rows: Sequence[Row]) -> list[Share]:
    """The adapters of each row's tokens, neighbours that use the same one joined."""
    shares: list[Share] = []
    place = 0
    for row in rows:
        end = place + len(row.ids)
        for name, weight in row.adapters.items():
            before = shares[-1] if shares else None
            if len(row.adapters) == 1 and before and (before.stop, before.name, before.weight) == (place, name, weight):
                shares[-1] = Share(before.start, end, name, weight)
            else:
                shares.append(Share(place, end, name, weight))
        place = end
    return shares
