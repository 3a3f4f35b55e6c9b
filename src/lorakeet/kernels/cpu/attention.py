"""Causal attention of packed (varlen) rows, forward and backward, as operators of torch (attention.c)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu.operators import HEAD, define, loaded, pointers

TILED = 24  # keys of an average row from which on this kernel, with tiles of 64, is faster than torch's products (docs/log)
NEEDS = f"heads in multiples of {HEAD}, rows of {TILED} keys or more on average"
GROUPS = 8  # at most so many groups of rows split the backward pass
FEW = 256  # tokens of a prefix, over all groups but the first, below which separate sums cost nothing noticeable
WORK = 32  # enough parts of work (heads × groups of rows) for the threads
PARTS = 12  # with at least so many parts, or all groups of rows, heads that share keys stay together


class AttentionShape(ctypes.Structure):
    """The Shape of attention.h; `owners` are the numbers that it points to."""

    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "prefix", "tokens", "heads", "kv", "d", "parts", "groups")),
        ("scale", ctypes.c_float),
    )


def _laid(rows: Sequence[int], prefix: int) -> tuple[list[int], list[int], int]:
    """The first token and the length of each row (the first one includes the prefix), and the most keys that a row sees."""
    lengths = [prefix + rows[0], *rows[1:]]
    starts = [0, *accumulate(lengths[:-1])]
    return starts, lengths, max(lengths[0], prefix + max(rows))


def _shape(q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int], prefix: int, scale: float) -> tuple[AttentionShape, int]:
    """The arguments of attention.c, and the bytes of workspace that each thread needs."""
    (tokens, heads, d), kv = q.shape, k.shape[1]
    if k.shape != (tokens, kv, d) or v.shape != k.shape:
        shapes = f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}"
        raise ValueError(f"keys and values must have the queries' tokens and numbers of a head: {shapes}")
    return attention_shape(rows, prefix, scale, (tokens, heads, kv, d)), _scratch_of_thread(_laid(rows, prefix)[2], d)


def attention_shape(rows: Sequence[int], prefix: int, scale: float, states: tuple[int, int, int, int]) -> AttentionShape:
    """The arguments of attention.c for `states`: tokens, query heads, key heads, numbers of a head."""
    starts, lengths, _ = _laid(rows, prefix)
    tokens, heads, kv, d = states
    if heads % kv or d % HEAD or min(lengths) < 0 or sum(lengths) > tokens:
        shapes = f"{tokens} tokens, {heads} heads over {kv}, of {d} numbers, with a prefix of {prefix}"
        wanted = f"whole groups, and heads in whole {HEAD} numbers"
        raise ValueError(f"rows of {list(rows)} tokens do not fit {shapes}; expected {wanted}")
    if not scale > 0:
        raise ValueError(f"scores are multiplied by {scale}; attention.c takes a factor above 0")
    array = ctypes.c_int64 * len(rows)
    owners = array(*starts), array(*lengths)
    addresses = (ctypes.cast(each, ctypes.c_void_p) for each in owners)
    parts, groups = _parts(heads, kv, rows), _groups(rows, prefix, kv)
    shape = AttentionShape(*addresses, len(rows), prefix, tokens, heads, kv, d, parts, groups, scale)
    shape.owners = owners
    return shape


def _parts(heads: int, kv: int, rows: Sequence[int]) -> int:
    return kv if len(rows) >= GROUPS or kv * len(rows) >= PARTS else heads


def _groups(rows: Sequence[int], prefix: int, kv: int) -> int:
    """The number of groups of rows. All but the first sum a prefix's gradient separately: for a long prefix no more such tokens
    than there are tokens, and no more groups than give enough parts."""
    most = min(len(rows), GROUPS)
    if (most - 1) * prefix <= FEW:
        return most
    return min(most, -(-WORK // kv), 1 + (prefix + sum(rows)) // prefix)


def _threads(parts: int) -> int:
    """How many threads compute: at most one for each part of the work, since each needs a workspace."""
    return min(torch.get_num_threads(), parts)


def _scratch_of_thread(longest: int, d: int) -> int:
    return int(loaded().attention_scratch(ctypes.c_int64(longest), ctypes.c_int64(d)))


def row_attention(q: Tensor, k: Tensor, v: Tensor, rows: list[int], prefix: int, scale: float) -> tuple[Tensor, Tensor]:
    """O (tokens, heads, d) and the base-2 logs of the softmax sums (heads, tokens), of q (tokens, heads, d), k and v (tokens,
    kv, d).

    `rows` are lengths after a shared prefix; padding tokens after the last row get zeros.
    """
    shape, each = _shape(q, k, v, rows, prefix, scale)
    threads = _threads(shape.heads * shape.rows)
    out, logs = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    out[prefix + sum(rows) :] = 0
    scratch = torch.empty(threads * each, dtype=torch.uint8)
    given = *pointers(q, k, v, out), *pointers(logs, dtype=torch.float32), *pointers(scratch, dtype=torch.uint8)
    loaded().attention_forward(ctypes.byref(shape), *given, threads)
    return out, logs


def row_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *laid: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """∂Q, ∂K, ∂V in the shapes of q, k, v, from the arguments (`laid`: rows, prefix, scale) and results of `row_attention`."""
    rows, prefix, scale = laid
    shape, each = _shape(q, k, v, rows, prefix, scale)
    threads = _threads(shape.parts * shape.groups)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grads[0][prefix + sum(rows) :] = 0
    sums = torch.empty(2, shape.parts, len(q), q.shape[2])
    of_prefix = torch.empty(2, shape.parts, shape.groups - 1, prefix, q.shape[2])
    scratch = torch.empty(threads * each, dtype=torch.uint8)
    narrow, wide = pointers(q, k, v, out, grad, *grads), pointers(logs, sums, of_prefix, dtype=torch.float32)
    given = *narrow[:4], wide[0], *narrow[4:], *wide[1:], *pointers(scratch, dtype=torch.uint8)
    loaded().attention_backward(ctypes.byref(shape), *given, threads)
    return grads


def _backward_workspace(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *laid: Any) -> int:
    """The most bytes of workspace of `row_attention_backward` for any prefix that rows of so many tokens may share: a plan does
    not know it."""
    rows, prefix, _ = laid
    (tokens, heads, d), kv = q.shape, k.shape[1]
    parts, groups = _parts(heads, kv, rows), _groups(rows, prefix, kv)
    scratch = _threads(parts * groups) * _scratch_of_thread(_laid(rows, prefix)[2], d)
    separate = max((groups - 1) * prefix, FEW, tokens if kv < WORK else 0)  # most prefix tokens that all groups sum separately
    return int(scratch + 8 * parts * (tokens + separate) * d)


def scores_of(rows: Sequence[int], prefix: int) -> int:
    """How many scores of a head are within the causal mask."""
    return sum(length * (length + 1) // 2 for length in (prefix + rows[0], *rows[1:])) + prefix * sum(rows[1:])


def attention_shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Empty results of an attention over q (tokens, heads, d): O, and the logs of the sums (heads, tokens)."""
    return torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)


def attention_backward_shapes(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Empty ∂Q, ∂K and ∂V."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_STATES, _LAID = "Tensor q, Tensor k, Tensor v", "int[] rows, int prefix, float scale"
ROW_ATTENTION = define(
    f"row_attention({_STATES}, {_LAID}) -> (Tensor, Tensor)",
    row_attention,
    attention_shapes,
    lambda q, k, v, rows, prefix, *_, **__: 4 * scores_of(rows, prefix) * q.shape[1] * q.shape[2],  # of two products
    lambda q, k, v, rows, prefix, _: _threads(q.shape[1] * len(rows)) * _scratch_of_thread(_laid(rows, prefix)[2], q.shape[2]),
)
ROW_ATTENTION_BACKWARD = define(
    f"row_attention_backward(Tensor grad, {_STATES}, Tensor out, Tensor logs, {_LAID}) -> (Tensor, Tensor, Tensor)",
    row_attention_backward,
    attention_backward_shapes,
    lambda _, q, *given, **__: 10 * scores_of(*given[4:6]) * q.shape[1] * q.shape[2],  # of five products
    _backward_workspace,
)


def takes(like: Tensor, heads: int, kv: int, d: int, rows: Sequence[int], prefix: int) -> bool:
    """True for heads of d numbers, and rows that are long enough."""
    return d % HEAD == 0 and sum(rows) + prefix * len(rows) >= TILED * len(rows)


class RowAttention:
    """Attention of all rows at once (kernels/protocol.PackedAttention). Saves O and the log-sums beside Q, K, V."""

    laid: tuple[Any, ...]  # the operators' arguments about rows

    def __init__(self, rows: tuple[int, ...], scale: float, prefix: int = 0) -> None:
        self.laid = list(rows), prefix, scale

    @property
    def operators(self) -> tuple[Any, Any]:
        """The operators of the forward and of the backward pass."""
        return ROW_ATTENTION, ROW_ATTENTION_BACKWARD

    @staticmethod
    def token_by_token(states: Tensor) -> Tensor:
        """(1, heads, tokens, d) as (tokens, heads, d), contiguous."""
        return states[0].transpose(0, 1).contiguous()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result (1, tokens, heads, d), and what `backward` needs beside Q, K and V."""
        result, logs = self.operators[0](*map(self.token_by_token, (query, key, value)), *self.laid)
        return result[None], (result, logs)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, logs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """∂Q, ∂K, ∂V in the shapes of Q, K, V."""
        given = grad[0].to(result.dtype).contiguous(), *map(self.token_by_token, (query, key, value)), result, logs
        of_q, of_k, of_v = (states.transpose(0, 1)[None] for states in self.operators[1](*given, *self.laid))
        return of_q, of_k, of_v
