"""Generation a step at a time: rows of different lengths in one pass, each with its own place in a bounded key-value cache.

A step takes any rows together: prompts (many tokens), prompts whose beginning is cached already, and rows that write one token.
They are laid end to end as in training, so there is no padding; single tokens of all rows are attended in one product.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.core.fused.packed_attention import QUERIES
from lorakeet.core.selection import Selection, Share
from lorakeet.errors import ConfigError
from lorakeet.kernels.cpu.block import NewTokens
from lorakeet.kernels.device import is_cpu
from lorakeet.models.text.model import TextModel

WHOLE_KEYS, WHOLE_TOKENS = 32, 8  # what their numbers are filled up to a multiple of: products leave code behind for every size


@dataclass(frozen=True)
class CacheRow:
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
        """The keys and values (slots, kv heads, capacity, d) of a layer; made like `key` and `value` (n, kv heads, d)."""
        if number not in self._layers:
            shapes = [(self.slots, states.shape[1], self.capacity, states.shape[2]) for states in (key, value)]
            self._layers[number] = (_zeros(shapes[0], key), _zeros(shapes[1], value))
        return self._layers[number]

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """The first `count` tokens of one sequence become those of another."""
        for key, value in self._layers.values():
            key[target, :, :count] = key[source, :, :count]
            value[target, :, :count] = value[source, :, :count]

    def wipe(self, slot: int) -> None:
        """Zeros where the slot's sequence was: numbers that are not finite would reach the next one, masked or not (0·NaN)."""
        for states in (states for layer in self._layers.values() for states in layer):
            states[slot].zero_()

    @property
    def bytes(self) -> int:
        """What the cache takes when every slot is full."""
        return sum(states.numel() * states.element_size() for layer in self._layers.values() for states in layer)


class CacheStep:
    """The attention of one step over the cache; what `row_attention` and decode blocks are handed as `row_cache`."""

    def __init__(self, cache: KeyValues, rows: Sequence[CacheRow], device: torch.device) -> None:
        self.cache, self.capacity = cache, cache.capacity
        places, place = [], 0
        for row in rows:
            places.append(place)
            place += len(row.ids)
        self._rows, self._places, self._device = rows, places, device

    @cached_property
    def new_tokens(self) -> NewTokens:
        """The tokens of the step, for blocks that are computed natively."""
        slots = [row.slot for row in self._rows for _ in row.ids]
        return NewTokens(slots, [row.start + place for row in self._rows for place in range(len(row.ids))], self.capacity)

    @cached_property
    def _prompts(self) -> list[tuple[CacheRow, int]]:
        return [(row, at) for row, at in zip(self._rows, self._places, strict=True) if len(row.ids) > 1]

    @cached_property
    def _single(self) -> _Singles | None:
        single = [(row, at) for row, at in zip(self._rows, self._places, strict=True) if len(row.ids) == 1]
        return _Singles([row for row, _ in single], [at for _, at in single], self.capacity, self._device) if single else None

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, as KeyValues.layer has them."""
        return self.cache.layer(number, key, value)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, cap: float | None = None
    ) -> Tensor:
        """q (tokens, heads, d), k and v (tokens, kv heads, d) of the new tokens to (tokens, heads, d)."""
        held = self.cache.layer(layer, k, v)
        if self._single is not None and len(self._single.at) == len(q):
            return self._single.attend(q, k, v, held, (scale, window, cap))
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        for row, at in self._prompts:
            part = slice(at, at + len(row.ids))
            out[part] = _of_prompt(row, q[part], (k[part], v[part]), held, (scale, window, cap))
        if self._single is not None:
            at_single = self._single.at
            out[at_single] = self._single.attend(q[at_single], k[at_single], v[at_single], held, (scale, window, cap))
        return out


Rule = tuple[float, int | None, float | None]  # scale, window and cap of an attention


class _Singles:
    """The rows of a step that have one new token, together."""

    def __init__(self, rows: Sequence[CacheRow], at: Sequence[int], capacity: int, device: torch.device) -> None:
        slots = [row.slot for row in rows]
        self.at = torch.tensor(at, dtype=torch.int64, device=device)
        self._slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self._ends = torch.tensor([row.start for row in rows], dtype=torch.int64, device=device)
        longest = max(row.start for row in rows) + 1
        self._longest = min(longest + -longest % WHOLE_KEYS, capacity)
        neighbours = slots == list(range(slots[0], slots[0] + len(slots)))
        self._held = slice(slots[0], slots[0] + len(slots)) if neighbours else self._slots  # neighbours: without a copy
        self._biases: dict[int | None, Tensor] = {}
        self._written: dict[int, Tensor] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, held: tuple[Tensor, Tensor], rule: Rule) -> Tensor:
        """q (rows, heads, d), k and v (rows, kv heads, d) to (rows, heads, d). As keys times queries: keys as they lie."""
        scale, window, cap = rule
        for states, added in zip(held, (k, v), strict=True):
            flat = added.reshape(-1, states.shape[3]).to(states.dtype)
            states.view(-1, states.shape[3]).index_copy_(0, self._at_ends(states), flat)
        seen_keys, seen_values = (states[self._held, :, : self._longest].flatten(0, 1) for states in held)
        queries = q.reshape(len(seen_keys), -1, q.shape[2])  # (rows·kv, G, d)
        scores = torch.bmm(seen_keys, queries.transpose(1, 2)).transpose(1, 2).contiguous()
        grouped = scores.view(len(q), -1, queries.shape[1], self._longest)
        if cap is not None:
            grouped, scale = torch.tanh(grouped.float() * (scale / cap)).mul_(cap), 1.0
        shares = torch.add(self._bias(window), grouped, alpha=scale).softmax(-1).to(v.dtype)
        return torch.bmm(shares.view(scores.shape), seen_values).view(*q.shape[:2], -1)

    def _at_ends(self, held: Tensor) -> Tensor:
        """Where the new keys, or values, of the rows go among all of a layer, whose sizes are (slots, kv heads, capacity, d)."""
        heads, capacity = held.shape[1:3]
        if heads not in self._written:
            first = (self._slots[:, None] * heads + torch.arange(heads, device=self._slots.device)) * capacity
            self._written[heads] = (first + self._ends[:, None]).flatten()
        return self._written[heads]

    def _bias(self, window: int | None) -> Tensor:
        """(rows, 1, 1, longest) in fp32: 0 where a row may look, −∞ elsewhere."""
        if window not in self._biases:
            distance = self._ends[:, None] - torch.arange(self._longest, device=self._ends.device)
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._biases[window] = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -math.inf)[:, None, None]
        return self._biases[window]


def _of_prompt(row: CacheRow, q: Tensor, new: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], rule: Rule) -> Tensor:
    """q (n, heads, d) of one row with n new tokens, whose keys and values (n, kv heads, d) are `new`, to (n, heads, d)."""
    scale, window, cap = rule
    count, end = len(q), row.start + len(q)
    for states, added in zip(held, new, strict=True):
        states[row.slot, :, row.start : end] = added.transpose(0, 1)
    alike = q.dtype == new[0].dtype == new[1].dtype and q.shape[2] == new[1].shape[2]
    if row.start == 0 and window is None and cap is None and alike:  # torch's own kernel: up to four times as fast here
        asked, key, value = (states.transpose(0, 1)[None] for states in (q, *new))
        found = nn.functional.scaled_dot_product_attention(asked, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return found[0].transpose(0, 1)
    keys, values = (states[row.slot, None] for states in held)
    out = q.new_empty(*q.shape[:2], values.shape[3])
    for first in range(0, count, QUERIES):
        last = min(first + QUERIES, count)
        seen = row.start + last
        states = _stacked(q[first:last].transpose(0, 1), keys.shape[1])[None]
        allowed = _allowed(row.start + first, last - first, seen, window, q.device)
        found = _attention(states, keys[:, :, :seen], values[:, :, :seen], allowed, scale, cap)
        out[first:last] = found[0].view(q.shape[1], last - first, -1).transpose(0, 1)
    return out


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros that take no memory until they are written, where the system hands out pages so.

    A row multiplies values past its own end by 0, beside a longer one and up to a whole number of keys: they must be numbers,
    and memory as it comes may hold a NaN, and 0·NaN is NaN.
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
    grouped = scores.view(*scores.shape[:2], -1, *allowed.shape[-2:])  # (1, 1, 1, n, m) for each of the G queries of a group
    shares = grouped.masked_fill(~allowed, -math.inf).view(scores.shape).softmax(-1)
    return torch.matmul(shares.to(v.dtype), v)


def step(text: TextModel, cache: KeyValues, rows: Sequence[CacheRow], selection: Selection | None = None) -> Tensor:
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
    filler = [0] * (-sum(lengths) % WHOLE_TOKENS if max(lengths) > 1 else 0)
    ids = torch.tensor([number for row in rows for number in row.ids] + filler, device=text.device)
    places = [row.start + place for row in rows for place in range(len(row.ids))]
    positions = torch.tensor(places + filler, device=text.device)
    if selection is not None:
        selection.divide(shares_of(rows), units=len(ids))
    with torch.no_grad():
        output: Any = text.model.get_decoder()(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], position_ids=positions[None], use_cache=False,
            row_lengths=lengths, row_products=text.products, row_cache=CacheStep(cache, rows, text.device),
        )  # fmt: skip
        last = torch.tensor(lengths).cumsum(0).sub(1).to(text.device)
        return text.head(output.last_hidden_state[0, last]).float()


def shares_of(rows: Sequence[CacheRow]) -> list[Share]:
    """The adapters of each row's tokens."""
    shares: list[Share] = []
    place = 0
    for row in rows:
        end = place + len(row.ids)
        shares += [Share(place, end, name, weight) for name, weight in row.adapters.items()]
        place = end
    return shares
