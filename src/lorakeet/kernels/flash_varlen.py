"""Causal attention of packed rows on a CUDA GPU: torch's flash kernel, once for all rows. **Not run on a GPU yet.**

FlashAttention-2 (arXiv 2307.08691), as torch has it, takes packed sequences and their offsets among queries and among keys, and
aligns the causal mask to the end of each sequence. Rows are such sequences. A prefix is stored once and belongs to every row: for
a call its keys and values are copied before each row's own, so that the row's queries, the last ones of their sequence, see it
whole. Padding tokens after the last row form one more sequence.

A kernel that reads the offsets differently would give numbers that look right. So before the first rows in heads of a shape,
made-up rows are computed by the kernel and by the definition; if these differ, a warning says so, and the table's next kernel
computes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakeet.kernels.cpu.attention import RowAttention, attention_backward_shapes, attention_shapes, scores_of
from lorakeet.kernels.cpu.operators import define
from lorakeet.kernels.host_copies import together_on
from lorakeet.kernels.proof import difference_found
from lorakeet.kernels.protocol import Situation

DTYPES = (torch.bfloat16, torch.float16)
WIDEST, STEP = 256, 8  # of a head
NO_BACKWARD = range(193, 225)  # widths of a head whose backward pass some GPUs lack (RTX 30, 40, 50; torch's sdp_utils.cpp)
NEEDS = f"heads of up to {NO_BACKWARD[0] - 1}, or from {NO_BACKWARD[-1] + 1} to {WIDEST} numbers, in multiples of {STEP}"
CAPABILITY = (8, 0)  # of a GPU, at least
BLOCK = 128  # tokens by which the kernel's sums of a sequence are padded, backward
EVERYTHING = -1  # for a window: unlimited
PROOF = (5, 300, 70, 1), 140, 150  # made-up rows, a prefix and a window, beyond the kernel's tiles of up to 128
EVERYWHERE = "CompositeExplicitAutograd"  # torch's key for every device: torch's kernel runs there, or raises
CLOSE = 3e-2  # relative to the largest number: a few roundings of bf16


def why_not(situation: Situation) -> str:
    """Why the kernel does not run in a situation."""
    device = situation.device
    if device.type not in ("cuda", "cpu") or (device.type == "cpu" and not situation.rehearsed):
        return "it is a kernel for CUDA GPUs"
    if situation.dtype not in DTYPES:
        return f"takes bfloat16 and float16; states are {str(situation.dtype).removeprefix('torch.')}"
    return "" if _has_kernel(device) else "this torch has no flash attention for the GPU"


def takes(like: Tensor, heads: int, kv: int, d: int, *_: object) -> bool:
    """True for heads of d numbers, where the kernel has proved to compute what attention is."""
    if d > WIDEST or d in NO_BACKWARD or d % STEP:
        return False
    few, group = min(2, kv), min(8, heads // kv)  # these show which head sees which, and take little memory
    return like.device.type == "cpu" or matches_definition(like.device, like.dtype, group * few, few, d)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    """True if this torch has the kernel for the GPU; a CPU stands for this machine's GPU, or for one that has the kernel."""
    if not torch.cuda.is_available():
        return True
    if torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device if device.type == "cuda" else None) >= CAPABILITY


class FlashVarlen(RowAttention):
    """Attention of all rows at once by the flash kernel (kernels/protocol.PackedAttention). Saves O and log-sums beside Q, K, V.

    `window`: how many of the last keys, including its own, a query sees; None: all.
    """

    def __init__(self, rows: tuple[int, ...], scale: float, prefix: int = 0, window: int | None = None) -> None:
        self.laid = list(rows), prefix, scale, EVERYTHING if window is None else window

    @property
    def operators(self) -> tuple[Any, Any]:
        return FLASH_ROWS, FLASH_ROWS_BACKWARD

    def log_sums(self, logs: Tensor, tokens: int) -> Tensor:
        """The logs of the sums (heads, tokens) of what `forward` keeps."""
        return logs

    @staticmethod
    def token_by_token(states: Tensor) -> Tensor:
        """The same, with contiguous heads."""
        found = states[0].transpose(0, 1)
        return found if found.stride(-1) == 1 else found.contiguous()


@dataclass(frozen=True)
class Sequences:
    """Rows as the kernel takes them: offsets of the sequences among queries and keys, int32, and the longest of each.

    With a prefix, `gathered` (keys) are the tokens whose keys the sequences have, one after another; `own` (tokens) are each
    token's indices among these, and `shared` (rows, prefix) the indices of the prefix's copies in every row.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    gathered: Tensor | None = None
    own: Tensor | None = None
    shared: Tensor | None = None


def sequence_lengths(rows: Sequence[int], prefix: int, tokens: int) -> tuple[list[int], list[int]]:
    """Numbers of queries and keys of each sequence: the prefix, the rows, the padding."""
    filler = tokens - prefix - sum(rows)
    ends = [prefix] if prefix else [], [filler] if filler else []
    return [*ends[0], *rows, *ends[1]], [*ends[0], *(prefix + length for length in rows), *ends[1]]


@functools.lru_cache(maxsize=64)  # micro-batches that pass a block one after another
def sequences(rows: tuple[int, ...], prefix: int, tokens: int, device: torch.device) -> Sequences:
    """The sequences, shared by all layers with these rows, so that they are copied to the GPU once."""
    queries, keys = sequence_lengths(rows, prefix, tokens)
    offsets = [[0, *accumulate(each)] for each in (queries, keys)]
    if not prefix:
        of_queries, of_keys = _int32(offsets, device)
        return Sequences(of_queries, of_keys, max(queries), max(keys))
    begins = [0, *accumulate(queries)]
    parts = [range(begin, begin + length) for begin, length in zip(begins, queries, strict=False)]
    gathered, own, shared = [*parts[0]], [*parts[0]], []
    for number, part in enumerate(parts[1:], start=1):
        if number <= len(rows):  # not the padding
            shared.append(range(len(gathered), len(gathered) + prefix))
            gathered += parts[0]
        own += range(len(gathered), len(gathered) + len(part))
        gathered += part
    of_queries, of_keys, *places = _int32([*offsets, gathered, own, [[*each] for each in shared]], device)
    return Sequences(of_queries, of_keys, max(queries), max(keys), *places)


def _int32(numbers: Sequence[Sequence[Any]], device: torch.device) -> list[Tensor]:
    """Lists of whole numbers on `device`."""
    return together_on([np.array(each, np.int32) for each in numbers], device)


def flash_forward(laid: Sequences, states: tuple[Tensor, ...], scale: float, window: int) -> tuple[Tensor, Tensor]:
    """O and the logs of the sums, by torch's kernel, of Q, K and V as sequences."""
    places = laid.queries, laid.keys, laid.most_queries, laid.most_keys, 0.0, window == EVERYTHING, False
    out, logs, *_ = torch.ops.aten._flash_attention_forward(*states, *places, scale=scale, **_seen_in(window))
    return out, logs


def flash_backward(laid: Sequences, given: tuple[Tensor, ...], scale: float, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """∂Q, ∂K and ∂V of `flash_forward`, from ∂O, Q, K, V, O and the logs."""
    device = given[0].device
    no_dropout = torch.empty(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)  # a state that is not read
    places = laid.queries, laid.keys, laid.most_queries, laid.most_keys, 0.0, window == EVERYTHING
    of_q, of_k, of_v = torch.ops.aten._flash_attention_backward(*given, *places, *no_dropout, scale=scale, **_seen_in(window))
    return of_q, of_k, of_v


def flash_rows(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """O (tokens, heads, d) and the logs of the sums (heads, tokens) of q, and k and v (tokens, kv, d); `given` are rows, prefix,
    scale and window."""
    rows, prefix, scale, window = given
    laid = sequences(tuple(rows), prefix, len(q), q.device)
    keys, values = gathered(laid, k, v)
    return flash_forward(laid, (q, keys, values), scale, window)


def flash_rows_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """∂Q, ∂K and ∂V in the shapes of q, k and v, from the arguments and results of `flash_rows`.

    Every sequence has a copy of a prefix's key; ∂L/∂k is the sum over the copies, in fp32.
    """
    rows, prefix, scale, window = given
    laid = sequences(tuple(rows), prefix, len(q), q.device)
    keys, values = gathered(laid, k, v)
    of_q, *found = flash_backward(laid, (grad, q, keys, values, out, logs), scale, window)
    of_k, of_v = (summed(laid, prefix, each) for each in found)
    return of_q, of_k, of_v


def gathered(laid: Sequences, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (tokens, kv, d) as the sequences have them: the prefix before each row."""
    if laid.gathered is None:
        return k, v
    return k.index_select(0, laid.gathered), v.index_select(0, laid.gathered)


def summed(laid: Sequences, prefix: int, found: Tensor) -> Tensor:
    """Gradients of what is `gathered`, (tokens, kv, d): those of the prefix's copies are summed in fp32."""
    if laid.own is None or laid.shared is None:
        return found
    result = found.index_select(0, laid.own)
    again = found.index_select(0, laid.shared.view(-1)).view(*laid.shared.shape, *found.shape[1:])
    result[:prefix] = (again.sum(0, dtype=torch.float32) + result[:prefix]).to(found.dtype)
    return result


def _seen_in(window: int) -> dict[str, int]:
    """The kernel's arguments for a window: keys to the left of a query's own, none to the right."""
    return {"window_size_left": EVERYTHING if window == EVERYTHING else window - 1, "window_size_right": 0}


def _backward_workspace(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, *given: Any) -> int:
    """Bytes of workspace of `flash_rows_backward`: the kernel's fp32 sums of ∂Q and of rows, ∂K and ∂V of every head of a group,
    and, with a prefix, K, V, ∂K and ∂V of all sequences, and the prefix's parts of a gradient with their sum.
    """
    rows, prefix, _, _ = given
    queries, keys = sequence_lengths(rows, prefix, len(q))
    (tokens, heads, d), kv = q.shape, k.shape[1]
    sums = 4 * (tokens + BLOCK * len(queries)) * heads * (1 + -(-d // 32) * 32)
    expanded = 2 * sum(keys) * heads * d * q.itemsize if heads != kv else 0
    parts = prefix * kv * d * (len(rows) * q.itemsize + 12) if prefix else 0
    return int(sums + expanded + 4 * _gathered_bytes(q, k, rows, prefix) + parts)


def _gathered_bytes(q: Tensor, k: Tensor, rows: list[int], prefix: int) -> int:
    if not prefix:
        return 0
    return sum(sequence_lengths(rows, prefix, len(q))[1]) * k.shape[1] * k.shape[2] * k.itemsize


def _flops(q: Tensor, k: Tensor, v: Tensor, *given: Any, **_: Any) -> int:
    """FLOPs of the two products of `flash_rows`, over the scores within mask and window."""
    rows, prefix, _scale, window = given
    scores = scores_of(rows, prefix)
    if window != EVERYTHING:
        scores = sum(min(window, place + 1) for place in _places(rows, prefix))
    return 4 * scores * q.shape[1] * q.shape[2]


def _places(rows: Sequence[int], prefix: int) -> list[int]:
    """The number of keys before each token of prefix and rows."""
    return [*range(prefix), *(prefix + place for length in rows for place in range(length))]


def matches_definition(device: torch.device, dtype: torch.dtype, heads: int, kv: int, d: int) -> bool:
    """True if the kernel computes made-up rows, both ways, as the definition does in fp32; else one warning says so."""
    return proved(FlashVarlen, "flash", device, dtype, (heads, kv, d))


@functools.cache
def proved(kernel: type[FlashVarlen], name: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]) -> bool:
    """The same for any `kernel` of torch, by its `name`; `sizes` are heads, heads of keys, and a head's width."""
    if said := difference_found(lambda: _any_difference(kernel, device, dtype, sizes)):
        logging.getLogger("lorakeet").warning(
            "Torch's %s kernel %s. Attention is computed by another kernel, which is slower, and "
            "may hold more memory than was planned. Please report it.",
            name,
            said,
        )
    return not said


def _any_difference(
    kernel: type[FlashVarlen], device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> str:
    """How a kernel differs from the definition on made-up rows, with and without prefix and window; empty if it does not."""
    rows, prefix, window = PROOF
    shapes = ((rows, shared, seen) for seen in (None, window) for shared in (0, prefix))
    return next(filter(None, (_difference(kernel, shape, sizes, (device, dtype)) for shape in shapes)), "")


def _difference(
    made: type[FlashVarlen],
    laid: tuple[tuple[int, ...], int, int | None],
    sizes: tuple[int, int, int],
    place: tuple[torch.device, torch.dtype],
) -> str:
    """How the kernel differs from the definition by more than rounding; empty if it does not."""
    (heads, kv, d), (device, dtype), (rows, shared, window) = sizes, place, laid
    tokens = shared + sum(rows) + 2  # and two of padding
    draw = torch.Generator().manual_seed(tokens)
    q, k, v, grad = (torch.randn(1, many, tokens, d, generator=draw).to(device, dtype) for many in (heads, kv, kv, heads))
    kernel = made(rows, d**-0.5, shared, window)
    out, kept = kernel.forward(q, k, v)
    found = out, *kernel.backward(grad.transpose(1, 2), q, k, v, *kept)
    for name, mine, theirs in zip(("O", "∂Q", "∂K", "∂V"), found, by_definition((q, k, v), grad, kernel.laid), strict=True):
        worst, allowed = (mine.float() - theirs).abs().max().item(), CLOSE * theirs.abs().max().item()
        if not worst <= allowed:
            seen = "" if window is None else f", in a window of {window},"
            return (
                f"computes {name} of rows of {list(rows)} tokens behind {shared} shared ones{seen} otherwise than attention is "
                f"defined on {device}: the largest difference is {worst:.3g}, where rounding explains {allowed:.3g}"
            )
    return ""


def by_definition(
    states: tuple[Tensor, ...], grad: Tensor, laid: tuple[list[int], int, float, int], sinks: Tensor | None = None
) -> tuple[Tensor, ...]:
    """O (1, tokens, heads, d), ∂Q, ∂K and ∂V by softmax(s·Q·Kᵀ + mask)·V in fp32; `grad` is (1, heads, tokens, d).

    With `sinks` (heads,), each head's softmax has this score more, which gives nothing.
    """
    rows, prefix, scale, window = laid
    tokens, device = grad.shape[2], grad.device
    filler = tokens - prefix - sum(rows)
    row = torch.repeat_interleave(torch.tensor([prefix, *rows, filler], device=device))
    place = torch.tensor([*_places(rows, prefix), *range(filler)], device=device)
    last = len(rows) + 1
    same = (row[:, None] == row) | ((row == 0) & (row[:, None] != last))
    distance = place[:, None] - place
    seen = same & (distance >= 0) & ((distance < window) if window != EVERYTHING else True)
    with torch.enable_grad():
        q, k, v = (each.detach().float().requires_grad_() for each in states)
        groups = q.shape[1] // k.shape[1]
        scores = (q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        out = scores.softmax(-1)[..., :tokens] @ v.repeat_interleave(groups, 1)
        return out.detach().transpose(1, 2), *torch.autograd.grad(out, (q, k, v), grad.float())


_STATES, _LAID = "Tensor q, Tensor k, Tensor v", "int[] rows, int prefix, float scale, int window"
FLASH_ROWS = define(
    f"flash_rows({_STATES}, {_LAID}) -> (Tensor, Tensor)",
    flash_rows,
    attention_shapes,
    _flops,
    lambda q, k, v, rows, prefix, *_: 2 * _gathered_bytes(q, k, rows, prefix),  # keys and values that share a prefix
    key=EVERYWHERE,
)
FLASH_ROWS_BACKWARD = define(
    f"flash_rows_backward(Tensor grad, {_STATES}, Tensor out, Tensor logs, {_LAID}) -> (Tensor, Tensor, Tensor)",
    flash_rows_backward,
    attention_backward_shapes,
    lambda grad, q, k, v, out, logs, *given, **_: 5 * _flops(q, k, v, *given) // 2,  # of five products
    _backward_workspace,
    key=EVERYWHERE,
)
