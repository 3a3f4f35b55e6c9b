"""Causal attention of rows laid end to end on a CPU, in narrow matrix products or by torch's flash kernel.

Each row attends to itself alone, and to a prefix that stands once before all rows if they share one: `rows` are the lengths
behind it. Tokens behind the last row are filler and get zeros. Grouped queries: head h = kv·G + g attends to key head kv. Shapes
throughout: query (1, kv·G, tokens, d), key and value (1, kv, tokens, d), result (1, tokens, kv·G, d), as transformers has them.

Which of the two is faster depends on the processor's bf16 products (core/precision; measured: docs/log.md): torch's flash kernel
runs its backward at fp32's rate whatever it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

PIECE = 32  # lengths are rounded up to whole pieces: oneDNN keeps code of its own for every shape that it has seen
QUERIES = 256  # queries of a row whose scores exist at once, whatever the row's length
SCORES = 1 << 21  # scores (of all heads, of all blocks taken together) that exist at once, unless one block has more


def causal_rows(  # noqa: PLR0917 - the states, how they are laid out, how they are multiplied
    query: Tensor, key: Tensor, value: Tensor, rows: tuple[int, ...], scale: float, products: torch.dtype, prefix: int = 0
) -> Tensor:
    """softmax(scale·Q·Kᵀ + causal mask)·V of each row; products in `products` if the states have that dtype, else in fp32."""
    kernel = kernel_for(query.dtype, products)(rows, scale, prefix)
    return cast(Tensor, CausalRows.apply(query, key, value, kernel))  # type: ignore[no-untyped-call]


def kernel_for(states: torch.dtype, products: torch.dtype) -> type[ProductRows | FlashRows]:
    """How rows are computed whose states have dtype `states`, where matrix products run in `products`."""
    return ProductRows if products != torch.float32 and products == states else FlashRows


class CausalRows(torch.autograd.Function):
    """Row attention by a kernel, which says what it keeps for the backward pass beside Q, K and V."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernel: ProductRows | FlashRows) -> Tensor:
        result, kept = kernel.forward(query, key, value)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.kernel = kernel
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernel.backward(grad, *ctx.saved_tensors), None


class ProductRows:
    """Attention written out in batched products of the states' own (narrow) dtype; softmax in fp32. Keeps Q, K, V only.

    With S = s·Q·Kᵀ + mask, P = softmax(S), O = P·V and ∂O given:

        ∂V = Pᵀ·∂O      ∂P = ∂O·Vᵀ      ∂S = P ∘ (∂P − rowsum(P ∘ ∂P))      ∂Q = s·∂S·K      ∂K = s·∂Sᵀ·Q

    The queries of a group of heads stand one below the other, (kv, G·n, d), so that K and V are never repeated and ∂K, ∂V are
    summed over the group by the product itself. A block of queries meets only the keys up to its last one; blocks of equal
    shape, of whichever rows, go through each product together. P is computed again backward.
    """

    def __init__(self, rows: tuple[int, ...], scale: float, prefix: int = 0) -> None:
        self.rows, self.scale, self.prefix = rows, scale, prefix
        self.laid: list[_Laid] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result, and what `backward` needs beside Q, K and V."""
        result = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        heads, kv = query.shape[1], key.shape[1]
        self.laid = [_Laid(blocks, query.device) for blocks in _alike(self.rows, self.prefix, heads)]
        for laid in self.laid:
            q, k, v = laid.queries.of(query, kv), laid.keys.of(key, kv), laid.keys.of(value, kv)
            laid.queries.put(result[0], torch.bmm(laid.softmax(q, k, self.scale), v))
        return result, ()

    def backward(self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """∂Q, ∂K, ∂V in the shapes of Q, K, V."""
        kv = key.shape[1]
        grad_q, grad_k, grad_v = (
            torch.zeros(states.shape[2], states.shape[1], states.shape[3], dtype=dtype, device=states.device)
            for states, dtype in ((query, query.dtype), (key, torch.float32), (value, torch.float32))
        )  # (tokens, heads, d); a prefix's and a long row's keys are met by several blocks, whose parts are added in fp32
        for laid in self.laid:
            q, k, v = laid.queries.of(query, kv), laid.keys.of(key, kv), laid.keys.of(value, kv)
            g = laid.queries.of(grad.transpose(1, 2), kv, blank=True)
            weights = laid.softmax(q, k, self.scale)
            laid.keys.add(grad_v, torch.bmm(weights.transpose(1, 2), g))
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            laid.keys.add(grad_k, torch.bmm(grad_scores.transpose(1, 2), q))
            laid.queries.put(grad_q, torch.bmm(grad_scores, k))
        found = grad_q.mul_(self.scale), grad_k.mul_(self.scale).to(key.dtype), grad_v.to(value.dtype)
        grad_q, grad_k, grad_v = (states.transpose(0, 1)[None] for states in found)
        return grad_q, grad_k, grad_v


@dataclass(frozen=True)
class _Places:
    """The tokens of some blocks (blocks, width), filled up with token 0; where each is `own`: what is found there belongs to it.

    A prefix stands in the first row as its own; the other rows look at it and answer nothing for it.
    """

    tokens: NDArray[np.int64]
    own: NDArray[np.bool_]
    shared: NDArray[np.bool_]  # blocks whose first tokens are the prefix, and not their own


@dataclass(frozen=True)
class _Blocks:
    """Blocks of queries of equal shape, each with the keys up to its last one: `offset` keys come before its first query."""

    queries: _Places
    keys: _Places
    offset: int
    prefix: int


@dataclass(frozen=True)
class _Row:
    """The tokens of a row, prefix and all, and how many of them are another row's."""

    tokens: NDArray[np.int64]
    shared: int


@lru_cache(maxsize=8)
def _alike(rows: tuple[int, ...], prefix: int, heads: int) -> tuple[_Blocks, ...]:
    """The blocks of all rows, those of equal shape (in whole pieces) together as far as SCORES allows."""
    shapes: dict[tuple[int, int], list[tuple[_Row, int]]] = {}  # (queries, offset): rows, and where the block stops
    for row in _rows(rows, prefix):
        for start in range(0, len(row.tokens), QUERIES):
            stop = min(start + QUERIES, len(row.tokens))
            if stop <= row.shared:
                continue  # nothing of its own asks there
            shapes.setdefault((_whole(stop - start), start), []).append((row, stop))
    found = []
    for (width, offset), blocks in shapes.items():
        together = max(1, SCORES // (heads * width * (offset + width)))
        for start in range(0, len(blocks), together):
            chosen = blocks[start : start + together]
            queries = _places(chosen, offset, width)
            keys = queries if offset == 0 else _places(chosen, 0, offset + width)
            found.append(_Blocks(queries, keys, offset, prefix))
    return tuple(found)


def _rows(rows: tuple[int, ...], prefix: int) -> Iterator[_Row]:
    """The tokens of each row. The first one's own follow the prefix, so that together they are an ordinary row."""
    for number, part in enumerate(_parts((prefix + rows[0], *rows[1:]))):
        own = np.arange(part.start, part.stop)
        yield _Row(own, 0) if number == 0 else _Row(np.concatenate([np.arange(prefix), own]), prefix)


def _places(blocks: list[tuple[_Row, int]], start: int, width: int) -> _Places:
    """The tokens of each row from `start` to where its block stops, filled up to `width`."""
    tokens = np.zeros((len(blocks), width), dtype=np.int64)
    own = np.zeros((len(blocks), width), dtype=np.bool_)
    for number, (row, stop) in enumerate(blocks):
        tokens[number, : stop - start] = row.tokens[start:stop]
        own[number, max(0, row.shared - start) : stop - start] = True
    return _Places(tokens, own, np.array([row.shared > start for row, _ in blocks]))


class _Laid:
    """Blocks of equal shape with their places as tensors, made once for both passes."""

    def __init__(self, blocks: _Blocks, device: torch.device) -> None:
        self.offset = blocks.offset
        self.queries = _Indexed(blocks.queries, blocks.prefix, device)
        self.keys = self.queries if blocks.keys is blocks.queries else _Indexed(blocks.keys, blocks.prefix, device)

    def softmax(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """softmax(scale·q·kᵀ + mask) in q's dtype, of q (·, G·b, d) and k (·, c, d).

        Keys that only fill a block up stand behind every real query, so the causal mask hides them too.
        """
        width = self.queries.shape[1]
        mask = torch.full((width, k.shape[1]), float("-inf"), dtype=q.dtype, device=q.device).triu_(self.offset + 1)
        scores = torch.baddbmm(mask.repeat(q.shape[1] // width, 1), q, k.transpose(1, 2), alpha=scale)
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)


class _Indexed:
    """The places of some blocks, to read from and to write to."""

    def __init__(self, places: _Places, prefix: int, device: torch.device) -> None:
        self.shape = places.tokens.shape
        self.tokens = torch.tensor(places.tokens.reshape(-1), device=device)  # of each place of the blocks
        whole = bool(places.own.all())
        self.own = None if whole else torch.tensor(np.flatnonzero(places.own), device=device)
        self.others = None if whole else torch.tensor(np.flatnonzero(~places.own), device=device)
        self.owners = self.tokens if self.own is None else self.tokens.index_select(0, self.own)
        self.prefix = prefix if places.shared.any() else 0
        self.sharing = torch.tensor(np.flatnonzero(places.shared), device=device) if self.prefix else None

    def of(self, states: Tensor, kv: int, *, blank: bool = False) -> Tensor:
        """The blocks of (1, kv·G, tokens, d) as (blocks·kv, G·width, d); what is not a block's own is blanked on demand."""
        blocks, width = self.shape
        chosen = states[0].transpose(0, 1).index_select(0, self.tokens)  # (blocks·width, kv·G, d)
        if blank and self.others is not None:
            chosen.index_fill_(0, self.others, 0)
        return chosen.view(blocks, width, states.shape[1], -1).transpose(1, 2).reshape(blocks * kv, -1, states.shape[3])

    def put(self, target: Tensor, found: Tensor) -> None:
        """Writes each block's own of (blocks·kv, G·width, d) to its places in (tokens, kv·G, d)."""
        target[self.owners] = self._own(self._laid(found, target), target)

    def add(self, target: Tensor, found: Tensor) -> None:
        """Adds everything that `found` holds for the tokens, own or shared, to their places; shapes as in `put`."""
        laid = self._laid(found, target)
        if self.sharing is not None:
            count = min(self.prefix, self.shape[1])
            of_each = laid.view(*self.shape, *target.shape[1:])[:, :count].index_select(0, self.sharing)
            target[:count] += of_each.sum(0, dtype=target.dtype)
        target.index_copy_(0, self.owners, self._own(laid, target).add_(target.index_select(0, self.owners)))

    def _laid(self, found: Tensor, target: Tensor) -> Tensor:
        """(blocks·kv, G·width, d) as (blocks·width, kv·G, d)."""
        blocks, width = self.shape
        return found.view(blocks, -1, width, found.shape[2]).transpose(1, 2).reshape(blocks * width, *target.shape[1:])

    def _own(self, laid: Tensor, target: Tensor) -> Tensor:
        return (laid if self.own is None else laid.index_select(0, self.own)).to(target.dtype)


def _whole(count: int) -> int:
    """`count` rounded up to whole PIECES."""
    return -(-count // PIECE) * PIECE


class FlashRows:
    """Attention by torch's CPU flash kernel in fp32, row by row; keeps O in its own dtype and the log-sums beside Q, K, V.

    The groups stand in the batch dimension over an expanded (not copied) K and V, and ∂K, ∂V are summed over it. A prefix is
    repeated before every row for the time of the call: its queries are computed with each row, and those of the first count.
    """

    def __init__(self, rows: tuple[int, ...], scale: float, prefix: int = 0) -> None:
        self.rows, self.scale, self.prefix = tuple(prefix + row for row in rows), scale, prefix

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result, and what `backward` needs beside Q, K and V."""
        groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
        spread = [self._spread(states) for states in (query, key, value)]
        q, k, v = _by_group(spread[0].float(), groups), spread[1].float(), spread[2].float()
        result = torch.zeros_like(spread[0].transpose(1, 2), memory_format=torch.contiguous_format)
        place = _by_group(result.transpose(1, 2), groups)
        logsumexps = []
        for part in _parts(self.rows):
            out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, part], _expanded(k, part, groups), _expanded(v, part, groups), 0.0, True, scale=self.scale
            )
            place[:, :, part] = out
            logsumexps.append(logsumexp)
        gathered = self._gathered(result.transpose(1, 2), tokens, summed=False).transpose(1, 2).contiguous()
        return gathered, (gathered, *logsumexps)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, *logsumexps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """∂Q, ∂K, ∂V in the shapes of Q, K, V."""
        groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
        spread = [self._spread(states) for states in (query, key, value)]
        q, k, v = _by_group(spread[0].float(), groups), spread[1].float(), spread[2].float()
        upstream = self._spread(grad.transpose(1, 2), first_only=True)
        g, o = _by_group(upstream.float(), groups), _by_group(self._spread(result.transpose(1, 2)).float(), groups)
        grads = [torch.zeros_like(states) for states in spread]
        place = _by_group(grads[0], groups)
        for part, logsumexp in zip(_parts(self.rows), logsumexps, strict=True):
            grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g[:, :, part],
                q[:, :, part],
                _expanded(k, part, groups),
                _expanded(v, part, groups),
                o[:, :, part],
                logsumexp,
                0.0,
                True,
                scale=self.scale,
            )
            place[:, :, part] = grad_q
            grads[1][0, :, part] = grad_k.sum(0)
            grads[2][0, :, part] = grad_v.sum(0)
        grad_q, grad_k, grad_v = (self._gathered(states, tokens, summed=True) for states in grads)
        return grad_q, grad_k, grad_v

    def _spread(self, states: Tensor, *, first_only: bool = False) -> Tensor:
        """(1, ·, tokens, d) with the prefix before every row; zeros in its place but before the first, if `first_only`."""
        if not self.prefix:
            return states
        before = states[:, :, : self.prefix]
        others = torch.zeros_like(before) if first_only else before
        pieces, start = [], self.prefix
        for number, row in enumerate(self.rows):
            pieces += [others if number else before, states[:, :, start : start + row - self.prefix]]
            start += row - self.prefix
        return torch.cat(pieces, dim=2)

    def _gathered(self, states: Tensor, tokens: int, *, summed: bool) -> Tensor:
        """The inverse of `_spread`, (1, ·, tokens, d): the prefix of the first row, or the sum over all; filler gets zeros."""
        if not self.prefix:
            return states
        parts = _parts(self.rows)
        befores = [states[:, :, part.start : part.start + self.prefix] for part in parts]
        before = torch.stack(befores).float().sum(0).to(states.dtype) if summed else befores[0]
        pieces = [before, *(states[:, :, part.start + self.prefix : part.stop] for part in parts)]
        filler = tokens - sum(piece.shape[2] for piece in pieces)
        return nn.functional.pad(torch.cat(pieces, dim=2), (0, 0, 0, filler))


def _parts(rows: tuple[int, ...]) -> list[slice]:
    """Where each row stands among the tokens."""
    ends = list(accumulate(rows))
    return [slice(end - length, end) for end, length in zip(ends, rows, strict=True)]


def _by_group(states: Tensor, groups: int) -> Tensor:
    """(1, kv·groups, n, d) seen as (groups, kv, n, d)."""
    _, heads, n, d = states.shape
    return states.view(heads // groups, groups, n, d).transpose(0, 1)


def _expanded(states: Tensor, part: slice, groups: int) -> Tensor:
    """One row of (1, kv, tokens, d), seen once for each group: (groups, kv, n, d)."""
    return states[:, :, part].expand(groups, -1, -1, -1)
