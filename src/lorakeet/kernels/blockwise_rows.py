"""Causal attention of packed rows on a GPU in torch's own operations, block of queries by block of queries.

It computes what torch's varlen kernels do not: scores capped by c·tanh(score / c) (Gemma 2), dropout of attention, and states of
any dtype and width. The scores of one block exist at once, and the backward pass computes them again. So memory grows with a
row's length, and not with its square.

Rows, a prefix, padding and windows are sequences as in kernels/flash_varlen. The keys of a sequence are consecutive, so query i
sees the keys from first[i] to last[i], and a block of consecutive queries the keys from the least first to the greatest last.
What is dropped follows from a seed and the number of a block, so that both passes drop the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorakeet.kernels.cpu.attention import attention_backward_shapes, attention_shapes
from lorakeet.kernels.cpu.operators import define
from lorakeet.kernels.flash_varlen import EVERYTHING, EVERYWHERE, FlashVarlen, gathered, sequence_lengths, sequences, summed
from lorakeet.kernels.host_copies import together_on
from lorakeet.kernels.protocol import Situation

MOST, SHARED = 1024, 256  # queries of a block within a row, and of one that several rows share: each also has the others' keys
SCORES, LEAST = 1 << 24, 32  # scores of all heads that exist at once, unless so many queries of a row have more
SEEDS = 1 << 62
NEEDS = "on AMD GPUs float32"


def why_not(situation: Situation) -> str:
    """Why the kernel does not run in a situation."""
    device = situation.device
    on_gpu = device.type == "cuda" or (device.type == "cpu" and situation.rehearsed)
    return "" if on_gpu else "it is a kernel for CUDA GPUs"


def takes(like: Tensor, *_: object) -> bool:
    """True but on AMD GPUs in half precision, where torch's own attention of each row keeps no probabilities either."""
    return torch.version.hip is None or like.dtype == torch.float32


class QueryBlock(NamedTuple):
    """Consecutive queries, and the keys that one of them sees; whether all of them see the first one."""

    queries: slice
    keys: slice
    see_first: bool

    def scores(self, heads: int) -> int:
        """How many scores the block has."""
        return heads * len(range(self.queries.start, self.queries.stop)) * len(range(self.keys.start, self.keys.stop))


@functools.lru_cache(maxsize=64)
def query_blocks(rows: tuple[int, ...], prefix: int, tokens: int, window: int, heads: int) -> tuple[QueryBlock, ...]:
    """All queries in blocks, each as long as its scores and keys allow: short rows share one, unless a long prefix parts them."""
    first, last = _seen(rows, prefix, tokens, window)
    scores, keys = _most(_most_keys(rows, prefix, tokens, window), heads)
    lengths = sequence_lengths(rows, prefix, tokens)[0]
    ends = np.repeat(np.cumsum(lengths), lengths)
    counts, found, start = np.arange(1, MOST + 1), [], 0
    while start < tokens:
        spans = last[start : start + min(MOST, max(SHARED, ends[start] - start))] + 1 - first[start]
        end = start + max(1, int(((spans <= keys) & (spans * counts[: len(spans)] <= scores)).sum()))
        seen = slice(int(first[start]), int(last[end - 1]) + 1)
        found.append(QueryBlock(slice(start, end), seen, bool(first[start] == first[end - 1])))
        start = end
    return tuple(found)


def _most(longest: int, heads: int) -> tuple[int, int]:
    """The most scores of a head, and keys, of a block whose queries see at most `longest` keys."""
    return max(SCORES // heads, LEAST * (longest + LEAST)), 2 * longest + SHARED


@functools.lru_cache(maxsize=64)
def keys_seen(
    rows: tuple[int, ...], prefix: int, tokens: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the last key that each query sees, (tokens, 1) int32, and the numbers of all keys, shared by all layers with
    these rows."""
    first, last = _seen(rows, prefix, tokens, window)
    sent = [each.astype(np.int32) for each in (first, last, np.arange(last[-1] + 1))]
    first, last, places = together_on(sent, device)
    return first[:, None], last[:, None], places


def _seen(rows: tuple[int, ...], prefix: int, tokens: int, window: int) -> tuple[Any, Any]:
    """The first and the last key that each query sees."""
    queries, keys = sequence_lengths(rows, prefix, tokens)
    ends = list(accumulate(keys))
    starts = np.repeat([0, *ends[:-1]], queries)
    last = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, queries, strict=True)])
    return starts if window == EVERYTHING else np.maximum(starts, last - window + 1), last


def _most_keys(rows: Sequence[int], prefix: int, tokens: int, window: int) -> int:
    """The most keys that a query sees."""
    longest = max(sequence_lengths(rows, prefix, tokens)[1])
    return longest if window == EVERYTHING else min(window, longest)


class BlockwiseRows(FlashVarlen):
    """Attention of all rows by blocks of queries (kernels/protocol.PackedAttention). Saves O and log-sums beside Q, K, V.

    `cap`: scores become cap·tanh(score / cap). `dropout`: the chance of each share of the softmax to be dropped; `seed` says
    which ones are. `window` as in FlashVarlen.
    """

    def __init__(  # noqa: PLR0917 - as the other kernels of rows, and what they lack
        self, rows: tuple[int, ...], scale: float, prefix: int = 0, window: int | None = None,
        cap: float | None = None, dropout: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(rows, scale, prefix, window)
        self.laid = *self.laid, cap or 0.0, dropout, seed

    @property
    def operators(self) -> tuple[Any, Any]:
        return BLOCKWISE_ROWS, BLOCKWISE_ROWS_BACKWARD

    @staticmethod
    def drawn_seed() -> int:
        """A seed from torch's generator for the host, whose state a pass that is computed again starts from."""
        return int(torch.randint(SEEDS, ()).item())


def blockwise_rows(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """O (tokens, heads, d) and the logs of the sums (heads, tokens) of q, and k and v (tokens, kv, d); `given` are rows, prefix,
    scale, window, cap (0: none), dropout and seed."""
    keys, values = gathered(sequences(tuple(given[0]), given[1], len(q), q.device), k, v)
    out, logs = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    best, share = (each.view(k.shape[1], -1, len(q)) for each in (logs, torch.empty_like(logs)))  # each query's largest
    for number, block in enumerate(_blocks(q, given)):
        scores = _scores(q, keys, block, given)[0]
        _hide(scores, keys, block, q, given)
        shares = scores.softmax(-1)
        for of_queries, each in ((best, scores), (share, shares)):
            torch.amax(_by_head(each, block, k.shape[1]), -1, out=of_queries[:, :, block.queries])
        del scores, each
        if given[5]:
            shares.mul_(_kept(shares, given, number))
        found = torch.bmm(shares.to(v.dtype), _of_keys(values, block))
        del shares
        out[block.queries] = _by_query(found, block, q.shape[1])
    best.sub_(share.log_())
    return out, logs


def blockwise_rows_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """∂Q, ∂K and ∂V in the shapes of q, k and v, from the arguments and results of `blockwise_rows`.

    With T = tanh(s·Q·Kᵀ / c), S = c·T, P = exp(S − log-sums) and M (1/(1 − dropout) for what is kept, 0 for the rest):

        ∂V = (P ∘ M)ᵀ·∂O      ∂S = P ∘ (M ∘ ∂O·Vᵀ − rowsum(O ∘ ∂O))      ∂Q = s·(∂S ∘ (1 − T²))·K      ∂K = s·(∂S ∘ (1 − T²))ᵀ·Q

    Parts of ∂K and ∂V are summed in fp32.
    """
    rows, prefix, scale = given[:3]
    laid, kv = sequences(tuple(rows), prefix, len(q), q.device), k.shape[1]
    keys, values = gathered(laid, k, v)
    sums = grad.float().mul_(out).sum(-1) if grad.dtype != torch.float32 else (grad * out).sum(-1)
    sums, negative = (each.view(kv, -1, len(q), 1) for each in (sums.t(), -logs))
    of_q = torch.empty_like(q)
    of_k, of_v = (torch.zeros(each.shape, dtype=torch.float32, device=q.device) for each in (keys, values))
    for number, block in enumerate(_blocks(q, given)):
        scores, own_q = _scores(q, keys, block, given, capped=False)
        turned = scores if given[4] else None
        own = _by_head(scores if turned is None else turned, block, kv)
        if turned is None:
            own.add_(negative[:, :, block.queries])
        else:
            scores = torch.add(negative[:, :, block.queries], own, alpha=given[4]).view_as(turned)
        _hide(scores, keys, block, q, given)
        shares = scores.exp_()
        del own
        own_grad = _by_key_head(grad[block.queries], kv)
        kept = _kept(shares, given, number) if given[5] else None
        dropped = (shares if kept is None else shares * kept).to(v.dtype)
        of_v[block.keys].transpose(0, 1).add_(_wide_bmm(dropped.transpose(1, 2), own_grad))
        del dropped
        of_scores = _wide_bmm(own_grad, _of_keys(values, block).transpose(1, 2))
        if kept is not None:
            of_scores.mul_(kept)
        _by_head(of_scores, block, kv).sub_(sums[:, :, block.queries])
        of_scores.mul_(shares)
        del scores, shares, kept
        if turned is not None:
            of_scores.addcmul_(of_scores * turned, turned, value=-1)
        del turned
        narrow = of_scores.mul_(scale) if q.dtype == torch.float32 else torch.mul(of_scores, scale, out=_narrow(of_scores, q))
        del of_scores
        of_q[block.queries] = _by_query(torch.bmm(narrow, _of_keys(keys, block)), block, q.shape[1])
        of_k[block.keys].transpose(0, 1).add_(_wide_bmm(narrow.transpose(1, 2), own_q))
        del narrow
    of_k, of_v = (summed(laid, prefix, each).to(k.dtype) for each in (of_k, of_v))
    return of_q, of_k, of_v


def _blocks(q: Tensor, given: tuple[Any, ...]) -> tuple[QueryBlock, ...]:
    return query_blocks(tuple(given[0]), given[1], len(q), given[3], q.shape[1])


def _scores(
    q: Tensor, keys: Tensor, block: QueryBlock, given: tuple[Any, ...], *, capped: bool = True
) -> tuple[Tensor, Tensor]:
    """A block's scores (kv, G·queries, keys) in fp32, and its queries (kv, G·queries, d). Where there is a cap c and they are not
    to be `capped` yet, tanh(s·Q·Kᵀ / c) in place of scores."""
    scale, _, cap = given[2:5]
    own = _by_key_head(q[block.queries], keys.shape[1])
    scores = _wide_bmm(own, _of_keys(keys, block).transpose(1, 2)).mul_(scale / cap if cap else scale)
    if cap:
        scores.tanh_()
    return scores.mul_(cap) if cap and capped else scores, own


def _hide(scores: Tensor, keys: Tensor, block: QueryBlock, q: Tensor, given: tuple[Any, ...]) -> None:
    """Makes −∞ of a block's scores (kv, G·queries, keys) where a key is not seen."""
    rows, prefix, _, window = given[:4]
    first, last, places = keys_seen(tuple(rows), prefix, len(q), window, q.device)
    seen, queries = places[block.keys], block.queries
    hidden = seen > last[queries]
    if not block.see_first:
        hidden.logical_or_(seen < first[queries])
    _by_head(scores, block, keys.shape[1]).masked_fill_(hidden, float("-inf"))


def _wide_bmm(left: Tensor, right: Tensor) -> Tensor:
    """left·right in fp32: on a GPU not rounded to a narrow dtype before, in which scores of float16 may overflow."""
    if left.dtype != torch.float32 and left.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left, right).float()


def _kept(like: Tensor, given: tuple[Any, ...], number: int) -> Tensor:
    """1/(1 − dropout) for the shares that are kept in a block, 0 for the others."""
    dropout, seed = given[5:7]
    draw = torch.Generator(device=like.device).manual_seed(seed + number)
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=draw).div_(1 - dropout)


def _by_key_head(states: Tensor, kv: int) -> Tensor:
    """(queries, kv·G, d) as (kv, G·queries, d)."""
    count, heads, d = states.shape
    return states.reshape(count, kv, heads // kv, d).permute(1, 2, 0, 3).reshape(kv, -1, d)


def _by_query(found: Tensor, block: QueryBlock, heads: int) -> Tensor:
    """(kv, G·queries, d) as (queries, kv·G, d)."""
    count = block.queries.stop - block.queries.start
    return found.view(heads, count, -1).transpose(0, 1)


def _by_head(scores: Tensor, block: QueryBlock, kv: int) -> Tensor:
    """(kv, G·queries, keys) as (kv, G, queries, keys)."""
    return scores.view(kv, -1, block.queries.stop - block.queries.start, scores.shape[2])


def _narrow(scores: Tensor, like: Tensor) -> Tensor:
    """Memory for the scores in the dtype of `like`."""
    return torch.empty_like(scores, dtype=like.dtype)


def _of_keys(states: Tensor, block: QueryBlock) -> Tensor:
    """A block's keys (kv, keys, d) of states (keys, kv, d)."""
    return states[block.keys].transpose(0, 1)


class _Sizes(NamedTuple):
    """What workspaces are made of, for any rows that are no longer than the longest ones."""

    scores: int  # of a block
    hidden: int  # bytes of what says which scores are hidden
    states: int  # numbers of a block's queries
    part: int  # numbers of a block's keys
    keys: int  # numbers of the keys of all sequences
    narrow: int  # bytes of a number of a copy in the states' dtype; 0 where that is fp32


def _sizes(q: Tensor, k: Tensor, given: tuple[Any, ...]) -> _Sizes:
    rows, prefix, _, window = given[:4]
    (tokens, heads, d), kv = q.shape, k.shape[1]
    queries, keys = sequence_lengths(rows, prefix, tokens)
    seen = _most_keys(rows, prefix, tokens, window)
    scores, span = _most(seen, heads)
    shared, own, span = min(SHARED, tokens), min(MOST, max(queries), seen + SHARED), min(span, sum(keys))
    each = min(scores, max(shared * span, own * min(own + seen, max(keys))))
    narrow = 0 if q.itemsize == 4 else q.itemsize
    return _Sizes(each * heads, 3 * each, max(shared, own) * heads * d, span * kv * d, sum(keys) * kv * d, narrow)


def _workspace(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> int:
    """Bytes of workspace of `blockwise_rows`: keys and values behind each row's prefix; a block's scores and shares in fp32; its
    queries, and their results as they come and as they go; and of all queries the largest share."""
    sizes = _sizes(q, k, given)
    behind = 2 * sizes.keys * k.itemsize if given[1] else 0
    return behind + 8 * sizes.scores + sizes.hidden + 3 * sizes.states * q.itemsize + 4 * q.shape[0] * q.shape[1]


def _backward_workspace(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *given: Any) -> int:
    """Bytes of workspace of `blockwise_rows_backward`: P and ∂S of a block in fp32, what caps and what drops, and a copy in
    narrow states; its queries and results; all sums of ∂K and ∂V in fp32, and a block's part. In the end, in place of a block,
    the sums of each row's copy of a prefix. Before all of these, O ∘ ∂O in fp32; the sums of its rows stay, as do log-sums."""
    sizes = _sizes(q, k, given)
    behind = 2 * sizes.keys * k.itemsize if given[1] else 0
    wide = 8 + sizes.narrow + 4 * bool(given[4]) + 4 * bool(given[5])
    sums = 8 * sizes.keys if sizes.narrow or given[1] else 0  # else they are what is returned
    block = sizes.scores * wide + sizes.hidden + 3 * sizes.states * q.itemsize + 4 * sizes.part
    rest = sums + max(block, 8 * sizes.keys if given[1] else 0)
    return behind + 8 * q.shape[0] * q.shape[1] + max(rest, 4 * q.numel())


def _flops(q: Tensor, k: Tensor, v: Tensor, *given: Any, **_: Any) -> int:
    """FLOPs of the two products of `blockwise_rows`, over all scores of the blocks."""
    return 4 * sum(block.scores(q.shape[1]) for block in _blocks(q, given)) * q.shape[2]


_STATES = "Tensor q, Tensor k, Tensor v"
_LAID = "int[] rows, int prefix, float scale, int window, float cap, float dropout, int seed"
BLOCKWISE_ROWS = define(
    f"blockwise_rows({_STATES}, {_LAID}) -> (Tensor, Tensor)",
    blockwise_rows,
    attention_shapes,
    _flops,
    _workspace,
    key=EVERYWHERE,
)
BLOCKWISE_ROWS_BACKWARD = define(
    f"blockwise_rows_backward(Tensor grad, {_STATES}, Tensor out, Tensor logs, {_LAID}) -> (Tensor, Tensor, Tensor)",
    blockwise_rows_backward,
    attention_backward_shapes,
    lambda grad, q, k, v, out, logs, *given, **_: 5 * _flops(q, k, v, *given) // 2,  # of five products
    _backward_workspace,
    key=EVERYWHERE,
)
