"""Causal attention of packed rows on a CPU in torch: batched products of a narrow dtype, or torch's flash kernel in fp32.

Each row attends to itself alone, and to a prefix before all rows if they share one: `rows` are the lengths after it. Tokens after
the last row are padding and get zeros. Grouped queries: head h = kv·G + g attends to key head kv. Shapes throughout: query
(1, kv·G, tokens, d), key and value (1, kv, tokens, d), result (1, tokens, kv·G, d), as transformers has them. Rows are computed
together in blocks of equal shape (core/fused/packed_blocks).

Where bf16 products are the faster ones (core/precision), C (kernels/cpu/attention) is faster than torch's products, and these are
faster than torch's flash kernel, whose backward pass runs at fp32's rate for any dtype (measured: docs/log).
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakeet.core.fused.packed_blocks import Indexed, QueryBlocks, blocks_of_queries, token_indices, whole_row_blocks
from lorakeet.kernels.choose import BATCHED_ROWS, CPU_FLASH_ROWS, packed_rows
from lorakeet.kernels.protocol import Kernel, PackedAttention

QUERIES = 256  # queries of a row whose scores exist at once, for any length of the row
KEPT_KEYS = 128  # up to so many keys P is saved: bytes of a gated MLP at most, and 4 % of a training step (docs/log)
SCORES = 1 << 21  # scores (of all heads and blocks in one product) that exist at once, unless one block has more
TOKENS = 1 << 12  # tokens of rows, each with its prefix, in one call of the flash kernel, unless one row has more


class AttentionRule(NamedTuple):
    """The scale of scores, a window in tokens, a cap of scores, and the score of a sink for each head, where there are some."""

    scale: float
    window: int | None = None
    cap: float | None = None
    sinks: Tensor | None = None


def causal_rows(  # noqa: PLR0917 - the states, how they are laid out, how they are multiplied
    query: Tensor, key: Tensor, value: Tensor, rows: tuple[int, ...], scale: float, products: torch.dtype, prefix: int = 0
) -> Tensor:
    """softmax(scale·Q·Kᵀ + causal mask)·V of each row; products in `products` if the states have that dtype, else in fp32."""
    shape = query.shape[1], key.shape[1], query.shape[3]
    kernel = kernel_of(packed_rows(query, products, *shape, rows, prefix))(rows, scale, prefix)
    return cast(Tensor, CausalRows.apply(query, key, value, kernel))  # type: ignore[no-untyped-call]


def kernel_of(chosen: Kernel) -> Any:
    """The class of the kernel that kernels/choose.packed_rows has chosen (kernels/protocol.PackedAttention); None: row by row."""
    return chosen.offers or TORCH_ROWS.get(chosen.name)


class CausalRows(torch.autograd.Function):
    """Packed attention by a kernel (kernels/protocol.PackedAttention), which also says what to save beside Q, K and V."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernel: PackedAttention) -> Tensor:
        result, kept = kernel.forward(query, key, value)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.kernel = kernel
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.kernel.backward(grad, *ctx.saved_tensors)
        return *(states.to(grad.dtype) for states in found), None


class ProductRows:
    """Attention as batched products in the states' own (narrow) dtype. Saves Q, K, V, and P of short rows.

    With S = s·Q·Kᵀ + mask, P = softmax(S), O = P·V and ∂O given:

        ∂V = Pᵀ·∂O      ∂P = ∂O·Vᵀ      ∂S = P ∘ (∂P − rowsum(P ∘ ∂P))      ∂Q = s·∂S·K      ∂K = s·∂Sᵀ·Q

    The queries of a group of heads are stacked, (kv, G·n, d), so that K and V are never repeated, and the product itself sums ∂K
    and ∂V over the group. The backward pass recomputes P of more than `KEPT_KEYS` keys.
    """

    def __init__(self, rows: tuple[int, ...], scale: float, prefix: int = 0) -> None:
        self.rows, self.scale, self.prefix = rows, scale, prefix
        self.laid: list[_Laid] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result, and what `backward` needs beside Q, K and V."""
        result = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        heads, kv = query.shape[1], key.shape[1]
        blocks = blocks_of_queries(self.rows, self.prefix, heads, QUERIES, SCORES)
        self.laid = [_Laid(each, kv, query.device) for each in blocks]
        kept = []
        for laid in self.laid:
            q, k, v = laid.queries_of(query), laid.keys_of(key), laid.keys_of(value)
            weights = laid.softmax(q, k, self.scale)
            laid.queries.put(result[0], laid.of_queries(torch.bmm(weights, v)))
            if laid.keeps_weights:
                kept.append(weights)
            del weights  # before the next one is made
        return result, tuple(kept)

    def backward(self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """∂Q, ∂K, ∂V in the shapes of Q, K, V."""
        grad_q, grad_k, grad_v = (
            torch.zeros(states.shape[2], states.shape[1], states.shape[3], dtype=dtype, device=states.device)
            for states, dtype in ((query, query.dtype), (key, torch.float32), (value, torch.float32))
        )  # (tokens, heads, d); several blocks share the keys of a prefix or a long row, whose parts are summed in fp32
        held = iter(kept)
        for laid in self.laid:
            q, k, v = laid.queries_of(query), laid.keys_of(key), laid.keys_of(value)
            g = laid.queries_of(grad.transpose(1, 2), blank=True)
            weights = next(held) if laid.keeps_weights else laid.softmax(q, k, self.scale)
            laid.keys.add(grad_v, laid.of_keys(torch.bmm(weights.transpose(1, 2), g)))
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            laid.keys.add(grad_k, laid.of_keys(torch.bmm(grad_scores.transpose(1, 2), q)))
            laid.queries.put(grad_q, laid.of_queries(torch.bmm(grad_scores, k)))
            del weights, grad_weights, grad_scores  # before the next ones are made
        found = grad_q.mul_(self.scale), grad_k.mul_(self.scale).to(key.dtype), grad_v.to(value.dtype)
        grad_q, grad_k, grad_v = (states.transpose(0, 1)[None] for states in found)
        return grad_q, grad_k, grad_v


class _Laid:
    """Blocks of equal shape for batched products: a block's queries as (·, G·width, d), its keys as (·, keys, d)."""

    def __init__(self, blocks: QueryBlocks, kv: int, device: torch.device) -> None:
        self.offset, self.kv = blocks.offset, kv
        self.queries, self.keys = token_indices(blocks, device)
        self.keeps_weights = self.keys.shape[1] <= KEPT_KEYS

    def queries_of(self, states: Tensor, *, blank: bool = False) -> Tensor:
        """(1, kv·G, tokens, d) as (blocks·kv, G·width, d); with `blank`, padding is zeroed."""
        return _by_key_head(self.queries.of(states, states.dtype, blank=blank), self.kv)

    def keys_of(self, states: Tensor) -> Tensor:
        """(1, kv, tokens, d) as (blocks·kv, keys, d)."""
        return _by_key_head(self.keys.of(states, states.dtype), self.kv)

    def of_queries(self, found: Tensor) -> Tensor:
        """The inverse of `queries_of`: (blocks, width, kv·G, d)."""
        return _by_token(found, self.queries.shape)

    def of_keys(self, found: Tensor) -> Tensor:
        """The inverse of `keys_of`: (blocks, keys, kv, d)."""
        return _by_token(found, self.keys.shape)

    def softmax(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """softmax(scale·q·kᵀ + mask) in q's dtype, of q (·, G·b, d) and k (·, c, d); torch sums in fp32 and rounds once.

        Padding keys come after every real query, so the causal mask hides them too.
        """
        width = self.queries.shape[1]
        mask = torch.full((width, k.shape[1]), float("-inf"), dtype=q.dtype, device=q.device).triu_(self.offset + 1)
        scores = torch.baddbmm(mask.repeat(q.shape[1] // width, 1), q, k.transpose(1, 2), alpha=scale)
        return torch.softmax(scores, -1)


def _by_key_head(blocks: Tensor, kv: int) -> Tensor:
    """(blocks, width, kv·G, d) as (blocks·kv, G·width, d)."""
    count, _, _, d = blocks.shape
    return blocks.transpose(1, 2).reshape(count * kv, -1, d)


def _by_token(found: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(blocks·kv, G·width, d) as (blocks, width, kv·G, d), for (blocks, width) = `shape`."""
    return found.view(shape[0], -1, shape[1], found.shape[2]).transpose(1, 2)


class CpuFlashRows:
    """Attention by torch's CPU flash kernel in fp32, rows of nearly equal length together.

    Saves O in its own dtype and the log-sums beside Q, K, V. During a call K and V are repeated for each head of a group, whose
    ∂K and ∂V are then summed, and a prefix for each row, whose gradients are.
    """

    def __init__(self, rows: tuple[int, ...], scale: float, prefix: int = 0) -> None:
        self.rows, self.scale, self.prefix = rows, scale, prefix
        self.places: list[Indexed] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result, and what `backward` needs beside Q, K and V."""
        result = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        self.places = [token_indices(blocks, query.device)[0] for blocks in whole_row_blocks(self.rows, self.prefix, TOKENS)]
        logsumexps = []
        for places in self.places:
            q, k, v = self._inputs(places, query, key, value)
            out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=self.scale)
            places.put(result[0], out.transpose(1, 2))
            logsumexps.append(logsumexp)
            del q, k, v, out  # before the next ones are made
        return result, (result, *logsumexps)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, *logsumexps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """∂Q, ∂K, ∂V in the shapes of Q, K, V, fp32."""
        groups, d = query.shape[1] // key.shape[1], query.shape[3]
        grads: list[Tensor] = []  # (tokens, heads, d), allocated when the first kernel's inputs are freed
        for places, logsumexp in zip(self.places, logsumexps, strict=True):
            of_q, *found = self._kernel_backward(places, grad, (query, key, value), result, logsumexp)
            found = [states.view(*states.shape[:2], -1, groups, d).sum(3) if groups > 1 else states for states in found]
            grads = grads or [of_q.new_zeros(query.shape[2], *states.shape[2:]) for states in (of_q, *found)]
            for target, states in zip(grads, (of_q, *found), strict=True):
                places.put(target, states)
            for target, states in zip(grads[1:], found, strict=True):
                places.add_shared(target, states)  # the prefix's own row was among the first
            del of_q, found, target, states  # before the next ones are made
        grad_q, grad_k, grad_v = (states.transpose(0, 1)[None] for states in grads)
        return grad_q, grad_k, grad_v

    def _kernel_backward(
        self, places: Indexed, grad: Tensor, given: tuple[Tensor, Tensor, Tensor], result: Tensor, logsumexp: Tensor
    ) -> list[Tensor]:
        """∂Q, and ∂K and ∂V for every head of Q, of some rows: (rows, width, heads, d)."""
        q, k, v = self._inputs(places, *given)
        upstream = places.of(grad.transpose(1, 2), torch.float32, blank=True)
        out = places.of(result.transpose(1, 2), torch.float32)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream.transpose(1, 2), q, k, v, out.transpose(1, 2), logsumexp, 0.0, True, scale=self.scale
        )
        return [states.transpose(1, 2) for states in found]

    @staticmethod
    def _inputs(places: Indexed, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V of some rows for the kernel, (rows, kv·G, width, d) fp32; K and V repeated for each head of a group."""
        groups = query.shape[1] // key.shape[1]
        return _heads_of(places, query, 1), _heads_of(places, key, groups), _heads_of(places, value, groups)


def _heads_of(places: Indexed, states: Tensor, times: int) -> Tensor:
    """Rows of states (1, heads, tokens, d) as (rows, heads·times, width, d), each head repeated, in fp32."""
    found = places.of(states, states.dtype).unsqueeze(3).expand(-1, -1, -1, times, -1)
    return found.to(torch.float32, memory_format=torch.contiguous_format).flatten(2, 3).transpose(1, 2)


TORCH_ROWS: dict[str, type[Any]] = {BATCHED_ROWS.name: ProductRows, CPU_FLASH_ROWS.name: CpuFlashRows}
