"""Causal attention of rows laid end to end on a CPU, in narrow matrix products or by torch's flash kernel.

Each row attends to itself alone. Grouped queries: head h = kv·G + g attends to key head kv. Shapes throughout: query
(1, kv·G, tokens, d), key and value (1, kv, tokens, d), result (1, tokens, kv·G, d), as transformers lays them out.

Which of the two is faster depends on the processor's bf16 products (core/precision; measured: docs/log.md): torch's flash kernel
runs its backward at fp32's rate whatever it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

PIECE = 32  # lengths are rounded up to whole pieces: oneDNN keeps code of its own for every shape that it has seen
QUERIES = 256  # queries whose scores exist at once: heads · 256 · (keys so far) numbers, whatever the row's length


def causal_rows(query: Tensor, key: Tensor, value: Tensor, rows: tuple[int, ...], scale: float, products: torch.dtype) -> Tensor:
    """softmax(scale·Q·Kᵀ + causal mask)·V of each row; products in `products` if the states have that dtype, else in fp32."""
    kernel = ProductRows if products != torch.float32 and products == query.dtype else FlashRows
    return cast(Tensor, kernel.apply(query, key, value, rows, scale))  # type: ignore[no-untyped-call]


class ProductRows(torch.autograd.Function):
    """Attention written out in batched products of the states' own (narrow) dtype; softmax in fp32. Saves Q, K, V only.

    With S = s·Q·Kᵀ + mask, P = softmax(S), O = P·V and ∂O given:

        ∂V = Pᵀ·∂O      ∂P = ∂O·Vᵀ      ∂S = P ∘ (∂P − rowsum(P ∘ ∂P))      ∂Q = s·∂S·K      ∂K = s·∂Sᵀ·Q

    The queries of a group stand one below the other, (kv, G·n, d), so that K and V are never repeated and ∂K, ∂V are summed over
    the group by the product itself. A block of queries meets only the keys up to its last one; P is computed again backward.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: tuple[int, ...], scale: float) -> Tensor:
        result = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        kv = key.shape[1]
        for queries, keys in _blocks(rows):
            q, k, v = _padded(query, queries, kv), _padded(key, keys, kv), _padded(value, keys, kv)
            weights = _softmax(q, k, _width(queries), _width(keys), scale)
            _unpad(result.transpose(1, 2), queries, torch.bmm(weights, v))
        ctx.save_for_backward(query, key, value)
        ctx.rows, ctx.scale = rows, scale
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        kv = key.shape[1]
        grad_q = torch.empty_like(query)
        grad_k, grad_v = torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
        for queries, keys in _blocks(ctx.rows):
            q, k, v = _padded(query, queries, kv), _padded(key, keys, kv), _padded(value, keys, kv)
            g, count = _padded(grad.transpose(1, 2), queries, kv), _width(keys)
            weights = _softmax(q, k, _width(queries), count, ctx.scale)
            grad_v[0, :, keys] += torch.bmm(weights.transpose(1, 2), g)[:, :count]
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_k[0, :, keys] += torch.bmm(grad_scores.transpose(1, 2), q)[:, :count]
            _unpad(grad_q, queries, torch.bmm(grad_scores, k))
        return grad_q.mul_(ctx.scale), grad_k.mul_(ctx.scale).to(key.dtype), grad_v.to(value.dtype), None, None


def _softmax(q: Tensor, k: Tensor, queries: int, keys: int, scale: float) -> Tensor:
    """softmax(scale·q·kᵀ + mask) in q's dtype; of q (kv, G·b, d) the first `queries` of each b are real, the last of `keys` keys.

    Keys behind the real ones come after every real query, so the causal mask hides them too.
    """
    groups = q.shape[1] // _whole(queries)
    mask = torch.full((_whole(queries), k.shape[1]), float("-inf"), dtype=q.dtype, device=q.device).triu_(keys - queries + 1)
    scores = torch.baddbmm(mask.repeat(groups, 1), q, k.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)


def _blocks(rows: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys they may see) of each block of each row, as places among the tokens."""
    for part in _parts(rows):
        for start in range(part.start, part.stop, QUERIES):
            stop = min(start + QUERIES, part.stop)
            yield slice(start, stop), slice(part.start, stop)


def _width(part: slice) -> int:
    return int(part.stop - part.start)


def _whole(count: int) -> int:
    """`count` rounded up to whole PIECES."""
    return -(-count // PIECE) * PIECE


def _padded(states: Tensor, part: slice, kv: int) -> Tensor:
    """One part of (1, kv·G, tokens, d) as (kv, G·b, d), b whole pieces, filled up with zeros."""
    _, heads, _, d = states.shape
    count = _width(part)
    out = states.new_zeros(kv, heads // kv, _whole(count), d)
    out[:, :, :count] = states[0, :, part].view(kv, heads // kv, count, d)
    return out.view(kv, -1, d)


def _unpad(target: Tensor, part: slice, block: Tensor) -> None:
    """Writes the real rows of (kv, G·b, d) to their places in (1, kv·G, tokens, d)."""
    place = target[0, :, part]
    count = place.shape[1]
    place.copy_(block.view(place.shape[0], -1, place.shape[2])[:, :count])


class FlashRows(torch.autograd.Function):
    """Attention by torch's CPU flash kernel in fp32, row by row; saves Q, K, V, O in their own dtype and the log-sums.

    The groups stand in the batch dimension over an expanded (not copied) K and V, and ∂K, ∂V are summed over it.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: tuple[int, ...], scale: float) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        q, k, v = _by_group(query.float(), groups), key.float(), value.float()
        result = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        place = _by_group(result.transpose(1, 2), groups)
        logsumexps = []
        for part in _parts(rows):
            out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, part], _expanded(k, part, groups), _expanded(v, part, groups), 0.0, True, scale=scale
            )
            place[:, :, part] = out
            logsumexps.append(logsumexp)
        ctx.save_for_backward(query, key, value, result, *logsumexps)
        ctx.rows, ctx.scale = rows, scale
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, *logsumexps = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        q, k, v = _by_group(query.float(), groups), key.float(), value.float()
        g, o = (_by_group(states.float().transpose(1, 2), groups) for states in (grad, result))
        grads = [torch.empty_like(states) for states in (query, key, value)]
        place = _by_group(grads[0], groups)
        for part, logsumexp in zip(_parts(ctx.rows), logsumexps, strict=True):
            grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g[:, :, part],
                q[:, :, part],
                _expanded(k, part, groups),
                _expanded(v, part, groups),
                o[:, :, part],
                logsumexp,
                0.0,
                True,
                scale=ctx.scale,
            )
            place[:, :, part] = grad_q
            grads[1][0, :, part] = grad_k.sum(0)
            grads[2][0, :, part] = grad_v.sum(0)
        return *grads, None, None


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
