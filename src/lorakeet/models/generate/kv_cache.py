"""Generation step by step: rows of different lengths in one pass, each with its own slot of a bounded KV cache.

A step takes any rows together: prompts (many tokens), prompts whose prefix is cached, and rows that generate one token. They are
packed as in training, so there is no padding; attention of all single tokens is one product. Where layers pass a state on from
token to token (models/generate/slot_states), rows with equally many new tokens are a pass instead.
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

from lorakeet.core.fused.packed_attention import QUERIES, AttentionRule
from lorakeet.core.selection import Selection, Share
from lorakeet.data.pack import Batch
from lorakeet.errors import ConfigError, LorakeetError, is_of_the_device
from lorakeet.kernels.cpu.block import NewTokens
from lorakeet.kernels.device import is_cpu
from lorakeet.models.files.validate import first_line
from lorakeet.models.generate.sample import CACHE
from lorakeet.models.generate.slot_states import RowsPass, SlotStates
from lorakeet.models.modules import decoder_of
from lorakeet.models.servable import refusal_to_serve, why_not_served
from lorakeet.models.text.model import TextModel

CHECKED, FIRST = 5, 3  # tokens before the last one in the check, and those of them that are computed first
CACHE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}  # of the largest logit
KEY_MULTIPLE, TOKEN_MULTIPLE = 32, 8  # their counts are padded to these: products leave compiled code for every size


@dataclass(frozen=True)
class CacheRow:
    """The new tokens of one sequence: `ids` follow the `start` tokens in its `slot` of the cache.

    `adapters` are the adapters of these tokens, with weights; empty for the bare base.
    """

    slot: int
    start: int
    ids: tuple[int, ...]
    adapters: Mapping[str, float]


class KeyValues:
    """Keys, values and states of up to `slots` sequences of up to `capacity` tokens. Memory is used once it is written."""

    def __init__(self, *, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.states = SlotStates(slots)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values (slots, kv heads, capacity, d) of a layer, allocated like `key`, `value` (n, kv heads, d)."""
        if number not in self._layers:
            shapes = [(self.slots, states.shape[1], self.capacity, states.shape[2]) for states in (key, value)]
            self._layers[number] = (_zeros(shapes[0], key), _zeros(shapes[1], value))
        return self._layers[number]

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copies the first `count` tokens of one sequence to another: all of its tokens, where there are states."""
        self.states.copy(source, target)
        for key, value in self._layers.values():
            key[target, :, :count] = key[source, :, :count]
            value[target, :, :count] = value[source, :, :count]

    def wipe(self, slot: int) -> None:
        """Zeroes a slot: numbers that are not finite would reach its next sequence even if masked (0·NaN)."""
        self.states.wipe([slot])
        for states in (states for layer in self._layers.values() for states in layer):
            states[slot].zero_()

    @property
    def bytes(self) -> int:
        """Bytes of the cache with every slot full."""
        return self.states.bytes + sum(states.nbytes for layer in self._layers.values() for states in layer)


class CacheStep:
    """The attention of one step over the cache: the `row_cache` of packed attention and decode blocks."""

    def __init__(self, cache: KeyValues, rows: Sequence[CacheRow], device: torch.device) -> None:
        self.cache, self.capacity = cache, cache.capacity
        offsets, offset = [], 0
        for row in rows:
            offsets.append(offset)
            offset += len(row.ids)
        self._rows, self._offsets, self._device = rows, offsets, device
        self.longest = max(row.start + len(row.ids) for row in rows)  # tokens of a text, earlier ones too

    @cached_property
    def new_tokens(self) -> NewTokens:
        """The tokens of the step, for blocks in C."""
        slots = [row.slot for row in self._rows for _ in row.ids]
        return NewTokens(slots, _positions(self._rows), self.capacity)

    @cached_property
    def _prompts(self) -> list[tuple[CacheRow, int]]:
        return [(row, at) for row, at in zip(self._rows, self._offsets, strict=True) if len(row.ids) > 1]

    @cached_property
    def _single(self) -> _Singles | None:
        single = [(row, at) for row, at in zip(self._rows, self._offsets, strict=True) if len(row.ids) == 1]
        return _Singles([row for row, _ in single], [at for _, at in single], self.capacity, self._device) if single else None

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of a layer, as KeyValues.layer does."""
        return self.cache.layer(number, key, value)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        """Returns the outputs (tokens, heads, d) of the new tokens' q (tokens, heads, d), k and v (tokens, kv heads, d)."""
        cached = self.cache.layer(layer, k, v)
        if self._single is not None and len(self._single.at) == len(q):
            return self._single.attend(q, k, v, cached, rule)
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        for row, at in self._prompts:
            part = slice(at, at + len(row.ids))
            out[part] = _of_prompt(row, q[part], (k[part], v[part]), cached, rule)
        if self._single is not None:
            at_single = self._single.at
            out[at_single] = self._single.attend(q[at_single], k[at_single], v[at_single], cached, rule)
        return out


class _Singles:
    """The rows of a step with one new token."""

    def __init__(self, rows: Sequence[CacheRow], at: Sequence[int], capacity: int, device: torch.device) -> None:
        slots = [row.slot for row in rows]
        self.at = torch.tensor(at, dtype=torch.int64, device=device)
        self._slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self._ends = torch.tensor([row.start for row in rows], dtype=torch.int64, device=device)
        longest = max(row.start for row in rows) + 1
        self._longest = min(longest + -longest % KEY_MULTIPLE, capacity)
        contiguous = slots == list(range(slots[0], slots[0] + len(slots)))
        self._index = slice(slots[0], slots[0] + len(slots)) if contiguous else self._slots  # a slice makes no copy
        self._biases: dict[int | None, Tensor] = {}
        self._written: dict[int, Tensor] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cached: tuple[Tensor, Tensor], rule: AttentionRule) -> Tensor:
        """Returns the outputs (rows, heads, d) of q (rows, heads, d), k and v (rows, kv heads, d), from keys·queriesᵀ: keys are
        not transposed."""
        scale, window, cap, sinks = rule
        for states, added in zip(cached, (k, v), strict=True):
            flat = added.reshape(-1, states.shape[3]).to(states.dtype)
            states.view(-1, states.shape[3]).index_copy_(0, self._at_ends(states), flat)
        seen_keys, seen_values = (states[self._index, :, : self._longest].flatten(0, 1) for states in cached)
        q, scale = _scaled(q, scale)
        queries = q.reshape(len(seen_keys), -1, q.shape[2])  # (rows·kv, G, d)
        scores = torch.bmm(seen_keys, queries.transpose(1, 2)).transpose(1, 2).contiguous()
        grouped = scores.view(len(q), -1, queries.shape[1], self._longest)
        if cap is not None:
            grouped, scale = torch.tanh(grouped.float() * (scale / cap)).mul_(cap), 1.0
        biased = torch.add(self._bias(window), grouped, alpha=scale)
        if sinks is not None:
            biased = torch.cat([biased, sinks.view(1, biased.shape[1], -1, 1).expand(*biased.shape[:3], 1)], -1)
        shares = biased.softmax(-1)[..., : self._longest].to(v.dtype)
        return torch.bmm(shares.reshape(scores.shape), seen_values).view(*q.shape[:2], -1)

    def _at_ends(self, cached: Tensor) -> Tensor:
        """Returns the flat indices of the rows' new keys or values in those of a layer, (slots, kv heads, capacity, d)."""
        heads, capacity = cached.shape[1:3]
        if heads not in self._written:
            first = (self._slots[:, None] * heads + torch.arange(heads, device=self._slots.device)) * capacity
            self._written[heads] = (first + self._ends[:, None]).flatten()
        return self._written[heads]

    def _bias(self, window: int | None) -> Tensor:
        """Returns the mask (rows, 1, 1, longest) in fp32: 0 for keys that a row attends to, −∞ for others."""
        if window not in self._biases:
            distance = self._ends[:, None] - torch.arange(self._longest, device=self._ends.device)
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._biases[window] = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -math.inf)[:, None, None]
        return self._biases[window]


def _of_prompt(
    row: CacheRow, q: Tensor, new: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], rule: AttentionRule
) -> Tensor:
    """Returns the outputs (n, heads, d) of one row with n new tokens: q (n, heads, d), keys and values `new` (n, kv heads, d)."""
    scale, window, cap, sinks = rule
    count, end = len(q), row.start + len(q)
    for states, added in zip(cached, new, strict=True):
        states[row.slot, :, row.start : end] = added.transpose(0, 1)
    alike = q.dtype == new[0].dtype == new[1].dtype and q.shape[2] == new[1].shape[2]
    plain = window is None and cap is None and sinks is None
    if row.start == 0 and plain and alike:  # torch's own kernel is up to four times as fast here
        query, key, value = (states.transpose(0, 1)[None] for states in (q, *new))
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and not is_cpu(q.device):  # torch's kernel for float32 and older GPUs takes no groups of heads
            key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
        found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return found[0].transpose(0, 1)
    keys, values = (states[row.slot, None] for states in cached)
    out = q.new_empty(*q.shape[:2], values.shape[3])
    for first in range(0, count, QUERIES):
        last = min(first + QUERIES, count)
        seen = row.start + last
        states = q[first:last].transpose(0, 1).reshape(1, keys.shape[1], -1, q.shape[2])  # the queries of a group stacked
        allowed = _allowed(row.start + first, last - first, seen, window, q.device)
        found = _attention(states, keys[:, :, :seen], values[:, :, :seen], allowed, AttentionRule(scale, None, cap, sinks))
        out[first:last] = found[0].view(q.shape[1], last - first, -1).transpose(0, 1)
    return out


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Returns zeros that use no memory until they are written, where the system allocates pages lazily.

    A row multiplies values past its own end by 0, up to the padded number of keys. Uninitialised memory may contain NaN, and
    0·NaN is NaN.
    """
    size = math.prod(shape) * like.element_size()
    if not is_cpu(like.device) or size == 0:
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


def _allowed(start: int, count: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """Returns a mask (1, 1, 1, count, seen), True for the keys that queries start … start + count − 1 attend to."""
    distance = torch.arange(start, start + count, device=device)[:, None] - torch.arange(seen, device=device)
    allowed = distance >= 0
    return (allowed if window is None else allowed & (distance < window))[None, None, None]


def _scaled(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries, and the scale of their scores. In float16 it is in the queries: without it their products may be above 65504."""
    return (q * scale, 1.0) if q.dtype == torch.float16 else (q, scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, rule: AttentionRule) -> Tensor:
    """Returns softmax(scale·q·kᵀ)·v over the allowed keys, softmax in fp32; q (rows, kv, G·n, d), k and v (rows, kv, m, d)."""
    q, scale = _scaled(q, rule.scale)
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if rule.cap is not None:
        scores = torch.tanh(scores / rule.cap) * rule.cap
    grouped = scores.view(*scores.shape[:2], -1, *allowed.shape[-2:])  # (1, 1, 1, n, m) for each of the G queries of a group
    grouped = grouped.masked_fill(~allowed, -math.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.float().view(1, grouped.shape[1], -1, 1, 1).expand(*grouped.shape[:4], 1)
        grouped = torch.cat([grouped, sinks], -1)
    shares = grouped.softmax(-1)[..., : scores.shape[-1]].reshape(scores.shape)
    return torch.matmul(shares.to(v.dtype), v)


def require_batched(text: TextModel) -> None:
    """Raises ConfigError for a model whose rows cannot share a batch, each with its own part of the cache, with the reason."""
    if text.attention == "varlen":
        return
    reason = why_not_served(text.model)
    if text.masks_by_kind and not reason:  # its layers pass states on
        return
    if not reason:
        why = f", as {text.why_not_varlen}" if text.why_not_varlen else ""
        reason = f"texts share a batch by model.attention varlen only, and it runs with {text.attention}{why}"
    raise _not_served(text, reason)


@torch.no_grad()
def check_cached(text: TextModel, context: int = CHECKED + 1) -> None:
    """Raises ConfigError unless a text that is written over the cache has the logits of the text as a whole, and texts of
    `context` tokens can be.

    Blocks that attend twice, or keep what is in no table here, would be wrong. So would texts that are longer than a chunk of
    the model's attention which only its mask has.
    """
    require_batched(text)
    if text.switch_length is not None and context > text.switch_length:
        raise ConfigError(
            f"{text.name} has other rotary frequencies from {text.switch_length + 1:,} tokens on, which changes the keys of a "
            f"text that is being written. Serve texts of at most {text.switch_length:,} tokens (--context), not {context:,}."
        )
    size = int(text.model.get_input_embeddings().weight.shape[0])
    ids = tuple((number * 7919 + 11) % size for number in range(CHECKED + 1))
    cache = KeyValues(slots=2, capacity=max(context, KEY_MULTIPLE))
    try:
        step(text, cache, [CacheRow(1, 0, ids[:FIRST], {})])
        found = torch.cat([step(text, cache, [CacheRow(1, *part, {})]) for part in ((FIRST, ids[FIRST:-1]), (CHECKED, ids[-1:]))])
        step(text, cache, [CacheRow(0, context - 1, ids[:1], {})])
    except LorakeetError:
        raise
    except Exception as error:  # whatever the model's code raises where the cache is not its own
        if is_of_the_device(error):
            raise
        raise _not_served(text, f"its code does not run over a cache ({first_line(error)})") from error
    places = torch.arange(len(ids), device=text.device)
    whole = Batch(torch.tensor(ids, device=text.device), (len(ids),), places[-2:], places[-2:], ("check",))
    wanted = text.head(text.hidden(whole)).float()
    off = float((found - wanted).abs().max()) / float(wanted.abs().max())
    if not off <= CACHE_TOLERANCE[text.dtype]:
        measured = f"over a cache its logits are {off:.2g} of their size off"
        reason = why_not_served(text.model)
        raise _not_served(text, f"{reason} ({measured})" if reason else measured)


def _not_served(text: TextModel, reason: str) -> ConfigError:
    return ConfigError(refusal_to_serve(text.name, text.model.config.model_type, reason))


def step(text: TextModel, cache: KeyValues, rows: Sequence[CacheRow], selection: Selection | None = None) -> Tensor:
    """Adds the new tokens of `rows` to the cache and returns the logits after each row's last one, (rows, vocabulary) in fp32.

    `selection` is the model's (models/inject.selection_of), needed if rows use adapters. Raises ConfigError without packed
    attention, ValueError for a row longer than the cache.
    """
    if not cache.states:  # else an earlier step found that it can be
        require_batched(text)
    for row in rows:
        if not row.ids or row.start + len(row.ids) > cache.capacity or not 0 <= row.slot < cache.slots:
            raise ValueError(f"{len(row.ids)} tokens after {row.start} in slot {row.slot} do not fit the cache")
    if text.masks_by_kind:
        return _step_with_states(text, cache, rows, selection)
    lengths = tuple(len(row.ids) for row in rows)
    padding = [0] * (-sum(lengths) % TOKEN_MULTIPLE if max(lengths) > 1 else 0)
    ids = torch.tensor([number for row in rows for number in row.ids] + padding, device=text.device)
    positions = torch.tensor(_positions(rows) + padding, device=text.device)
    if selection is not None:
        selection.divide(shares_of(rows), units=len(ids))
    with torch.no_grad():
        output: Any = decoder_of(text.model)(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], position_ids=positions[None], use_cache=False,
            row_lengths=lengths, row_products=text.products, row_cache=CacheStep(cache, rows, text.device),
        )  # fmt: skip
        last = torch.tensor(lengths).cumsum(0).sub(1).to(text.device)
        return text.head(output.last_hidden_state[0, last]).float()


def _step_with_states(text: TextModel, cache: KeyValues, rows: Sequence[CacheRow], selection: Selection | None) -> Tensor:
    """As `step`, for a model whose layers pass states on: rows with equally many new tokens together."""
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(len(row.ids), []).append(place)
    found = torch.cat([_pass_with_states(text, cache, [rows[place] for place in own], selection) for own in places.values()])
    order = torch.tensor([place for own in places.values() for place in own])
    return found[order.argsort().to(found.device)]


@torch.no_grad()
def _pass_with_states(text: TextModel, cache: KeyValues, rows: Sequence[CacheRow], selection: Selection | None) -> Tensor:
    count, longest = len(rows[0].ids), max(row.start + len(row.ids) for row in rows)
    longest = min(longest + -longest % KEY_MULTIPLE, cache.capacity)
    laid = RowsPass([row.slot for row in rows], [row.start for row in rows], count, longest, text.device)
    if selection is not None:
        selection.divide(shares_of(rows), units=len(rows) * count)
    window = getattr(text.model.config.get_text_config(), "sliding_window", None)
    ids = torch.tensor([row.ids for row in rows], device=text.device)
    with cache.states.lent(text.model.config, laid, cache.layer) as own:
        output: Any = decoder_of(text.model)(
            input_ids=ids, attention_mask=laid.masks(window, text.dtype), position_ids=laid.positions, use_cache=True,
            **{CACHE: own},
        )  # fmt: skip
    return text.head(output.last_hidden_state[:, -1]).float()


def _positions(rows: Sequence[CacheRow]) -> list[int]:
    """Returns the position of each new token in its sequence."""
    return [row.start + number for row in rows for number in range(len(row.ids))]


def shares_of(rows: Sequence[CacheRow]) -> list[Share]:
    """Returns the adapters of each row's tokens."""
    shares: list[Share] = []
    start = 0
    for row in rows:
        end = start + len(row.ids)
        shares += [Share(start, end, name, weight) for name, weight in row.adapters.items()]
        start = end
    return shares
