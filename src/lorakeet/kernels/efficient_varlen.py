"""Causal attention of packed rows by torch's memory-efficient kernel, once for all rows. **Not run on a GPU yet.**

It has what the flash kernel (kernels/flash_varlen) lacks: GPUs before Ampere (T4, RTX 20), float32, and heads of other
widths. No probabilities (n, n) are kept. Rows, a prefix, padding and windows are sequences as there, with the causal mask aligned
to their ends. The kernel has no grouped heads, so keys and values are copied for each head of a group.

Before the first rows in heads of a shape, made-up rows are compared with the definition, as there.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakeet.kernels.cpu.attention import attention_backward_shapes, scores_of
from lorakeet.kernels.cpu.operators import define
from lorakeet.kernels.flash_varlen import (
    EVERYTHING,
    EVERYWHERE,
    FlashVarlen,
    gathered,
    proved,
    sequence_lengths,
    sequences,
    summed,
)
from lorakeet.kernels.host_copies import together_on
from lorakeet.kernels.protocol import Situation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STEP = 8  # of a head's width
NEEDS = f"heads in multiples of {STEP}"
CAPABILITY = (7, 5)  # of a GPU, at least; bfloat16 needs what flash does
BFLOAT16 = (8, 0)
BOTTOM_RIGHT = 2  # of the kernel's masks: causal, aligned to the end of each sequence
ALIGNED = 32  # queries by which log-sums are padded
BLOCK = 64  # tokens by which the sums of a sequence are padded, backward


def why_not(situation: Situation) -> str:
    """Why the kernel does not run in a situation."""
    device = situation.device
    if device.type not in ("cuda", "cpu") or (device.type == "cpu" and not situation.rehearsed):
        return "it is a kernel for CUDA GPUs"
    if situation.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16; states are {str(situation.dtype).removeprefix('torch.')}"
    least = BFLOAT16 if situation.dtype == torch.bfloat16 else CAPABILITY
    return "" if _has_kernel(device, least) else "this torch has no memory-efficient attention for the GPU"


def takes(like: Tensor, heads: int, kv: int, d: int, *_: object) -> bool:
    """True for heads of d numbers, where the kernel has proved to compute what attention is."""
    if d % STEP:
        return False
    if like.device.type == "cpu":  # a rehearsal, or a kernel that stands for torch's
        return type(like) is not Tensor or torch._C._dispatch_has_kernel_for_dispatch_key(FORWARD, "CPU")
    few, group = min(2, kv), min(8, heads // kv)
    return proved(EfficientVarlen, "memory-efficient", like.device, like.dtype, (group * few, few, d))


@functools.cache
def _has_kernel(device: torch.device, least: tuple[int, int]) -> bool:
    """True if this torch has the kernel for the GPU; a CPU stands for this machine's GPU, or for one that has the kernel."""
    if not torch.cuda.is_available():
        return True
    if torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device if device.type == "cuda" else None) >= least


class EfficientVarlen(FlashVarlen):
    """Attention of all rows at once by that kernel (kernels/protocol.PackedAttention). Saves O and log-sums beside Q, K, V."""

    @property
    def operators(self) -> tuple[Any, Any]:
        return EFFICIENT_ROWS, EFFICIENT_ROWS_BACKWARD

    def log_sums(self, logs: Tensor, tokens: int) -> Tensor:
        rows, prefix, *_ = self.laid
        fake = hasattr(logs, "fake_mode")  # of a step on shapes, whose tensors are not kept
        places = _places_of_logs.__wrapped__ if fake else _places_of_logs
        return logs.transpose(1, 2).flatten(0, 1).index_select(0, places(tuple(rows), prefix, tokens, logs.device)).t()


@functools.lru_cache(maxsize=64)
def _places_of_logs(rows: tuple[int, ...], prefix: int, tokens: int, device: torch.device) -> Tensor:
    """Where each token's log-sum lies among those of all sequences, which are padded to the longest."""
    queries, _ = sequence_lengths(rows, prefix, tokens)
    places = [np.arange(count) + number * _padded(queries) for number, count in enumerate(queries)]
    return together_on([np.concatenate(places).astype(np.int32)], device)[0]


def _padded(queries: list[int]) -> int:
    return -(-max(queries) // ALIGNED) * ALIGNED


FORWARD = "aten::_efficient_attention_forward"


def efficient_rows(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """O (tokens, heads, d) and the logs of the sums (sequences, heads, queries) of q, and k and v (tokens, kv, d); `given` are
    rows, prefix, scale and window."""
    rows, prefix, scale, window = given
    laid = sequences(tuple(rows), prefix, len(q), q.device)
    states = q[None], *(_for_every_head(each, q.shape[1]) for each in gathered(laid, k, v))
    places = None, laid.queries, laid.keys, laid.most_queries, laid.most_keys
    out, logs, *_ = torch.ops.aten._efficient_attention_forward(
        *states, *places, 0.0, BOTTOM_RIGHT, True, scale=scale, window_size=_seen_in(window)
    )
    return out[0], logs


def efficient_rows_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """∂Q, ∂K and ∂V in the shapes of q, k and v, from the arguments and results of `efficient_rows`.

    Gradients are summed over the heads of a group in fp32.
    """
    rows, prefix, scale, window = given
    laid = sequences(tuple(rows), prefix, len(q), q.device)
    keys, values = (_for_every_head(each, q.shape[1]) for each in gathered(laid, k, v))
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)  # of a random state: nothing is dropped
    of_q, *found, _ = torch.ops.aten._efficient_attention_backward(
        grad[None], q[None], keys, values, None, out[None], laid.queries, laid.keys, laid.most_queries, laid.most_keys, logs, 0.0,
        nothing, nothing, BOTTOM_RIGHT, False, scale=scale, window_size=_seen_in(window),
    )  # fmt: skip
    of_k, of_v = (summed(laid, prefix, _of_groups(each[0], k.shape[1])) for each in found)
    return of_q[0], of_k, of_v


def _for_every_head(states: Tensor, heads: int) -> Tensor:
    """(1, tokens, heads, d) of states (tokens, kv, d)."""
    groups = heads // states.shape[1]
    return (states if groups == 1 else states.repeat_interleave(groups, dim=1))[None]


def _of_groups(found: Tensor, kv: int) -> Tensor:
    """Gradients (tokens, heads, d) summed over the heads of each of `kv` groups."""
    groups = found.shape[1] // kv
    return found if groups == 1 else found.view(len(found), kv, groups, -1).sum(2, dtype=torch.float32).to(found.dtype)


def _seen_in(window: int) -> int | None:
    return None if window == EVERYTHING else window


def _shapes(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    rows, prefix, *_ = given
    queries, _ = sequence_lengths(rows, prefix, len(q))
    return torch.empty_like(q), q.new_empty(len(queries), q.shape[1], _padded(queries), dtype=torch.float32)


def _copies(q: Tensor, k: Tensor, v: Tensor, rows: list[int], prefix: int, *_: Any) -> int:
    """Bytes of keys and values that lie for each head, and before that behind each row's prefix."""
    keys = sum(sequence_lengths(rows, prefix, len(q))[1])
    heads, kv, d = q.shape[1], k.shape[1], k.shape[2]
    return 2 * keys * d * q.itemsize * ((heads if heads != kv else 0) + (kv if prefix else 0))


def _backward_workspace(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *given: Any) -> int:
    """Bytes of workspace of `efficient_rows_backward`: copies as in the forward pass and gradients in their shapes, fp32 sums of
    all gradients, and a group's sums."""
    rows, prefix, *_ = given
    queries, keys = sequence_lengths(rows, prefix, len(q))
    (tokens, heads, d), kv = q.shape, k.shape[1]
    wide = -(-d // 32) * 32
    sums = 4 * heads * wide * (tokens + 2 * sum(keys) + 3 * BLOCK * len(queries))
    groups = 2 * sum(keys) * kv * d * 4 if heads != kv else 0
    return int(sums + groups + _copies(q, k, v, rows, prefix) + 2 * sum(keys) * heads * d * q.itemsize)


def _flops(q: Tensor, k: Tensor, v: Tensor, *given: Any, **_: Any) -> int:
    """FLOPs of the two products of `efficient_rows`, over the scores within the mask; a window is not counted."""
    return 4 * scores_of(*given[:2]) * q.shape[1] * q.shape[2]


_STATES, _LAID = "Tensor q, Tensor k, Tensor v", "int[] rows, int prefix, float scale, int window"
EFFICIENT_ROWS = define(
    f"efficient_rows({_STATES}, {_LAID}) -> (Tensor, Tensor)", efficient_rows, _shapes, _flops, _copies, key=EVERYWHERE
)
EFFICIENT_ROWS_BACKWARD = define(
    f"efficient_rows_backward(Tensor grad, {_STATES}, Tensor out, Tensor logs, {_LAID}) -> (Tensor, Tensor, Tensor)",
    efficient_rows_backward,
    attention_backward_shapes,
    lambda grad, q, k, v, out, logs, *given, **_: 5 * _flops(q, k, v, *given) // 2,
    _backward_workspace,
    key=EVERYWHERE,
)
