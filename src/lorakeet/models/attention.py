"""Causal attention over rows laid end to end: no padding, no attention across rows. Registered with transformers by name.

The model runs on one sequence (1, tokens) with `row_lengths=(n₁, n₂, …)` among its keyword arguments and position ids that
begin again at each row. Each row attends to itself alone, so the cost is Σn² and not (Σn)².

On a CPU the bf16 backward of torch's flash kernel is about three times slower than its fp32 one (measured: docs/log.md), so
rows are computed in fp32 there and kept in the model's dtype between forward and backward.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from lorakeet.errors import EnvironmentProblem

VARLEN = "lorakeet_varlen"


def register() -> None:
    """Makes the attention known to transformers under the name VARLEN; calling it again changes nothing."""
    AttentionInterface.register(VARLEN, row_attention)
    AttentionMaskInterface.register(VARLEN, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def row_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **settings: Any
) -> tuple[Tensor, None]:
    """query (1, heads, tokens, d), key and value (1, kv heads, tokens, d) to (1, tokens, heads, d), as transformers expects.

    Settings used: `row_lengths`, `scaling`, `dropout`, `sliding_window`, `softcap`. Raises EnvironmentProblem for what it
    does not implement (attention sinks, position biases, non-causal attention), so that nothing is left out in silence.
    """
    lengths = settings.get("row_lengths")
    _refuse_unknown(module, query, lengths, attention_mask, settings)
    rows = cast("tuple[int, ...]", lengths)
    scale = settings.get("scaling") or 1 / math.sqrt(query.shape[-1])
    window, softcap, dropout = settings.get("sliding_window"), settings.get("softcap"), settings.get("dropout") or 0.0
    plain = softcap is None and dropout == 0.0 and (window is None or max(rows) <= window)
    if plain and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        return cast(Tensor, _CausalRows.apply(query, key, value, rows, scale)), None  # type: ignore[no-untyped-call]
    outputs = []
    for q, k, v in zip(*(torch.split(states, list(rows), dim=2) for states in (query, key, value)), strict=True):
        if softcap is not None:
            out = _softcapped(q, k, v, scale, softcap, window)
        else:
            mask = _band(q.shape[2], window, q.device) if window is not None and q.shape[2] > window else None
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _refuse_unknown(module: nn.Module, query: Tensor, lengths: Any, mask: Tensor | None, settings: dict[str, Any]) -> None:
    kind = type(module).__name__
    if lengths is None:
        raise EnvironmentProblem(f"{kind} did not hand row_lengths on to its attention; load this model with attention: sdpa.")
    if query.shape[0] != 1 or query.shape[2] != sum(lengths):
        raise EnvironmentProblem(
            f"{kind} gave its attention queries of shape {tuple(query.shape)} for rows of {sum(lengths)} tokens in all; "
            "load this model with attention: sdpa."
        )
    unknown = [name for name in ("s_aux", "position_bias", "cache") if settings.get(name) is not None]
    if settings.get("is_causal", getattr(module, "is_causal", True)) is False:
        unknown.append("is_causal=False")
    if mask is not None:
        unknown.append("attention_mask")
    if (limit := _limit_in_mask(module, settings)) is not None and max(lengths) > limit:
        unknown.append(f"a window of {limit} tokens that only its mask knows, for a row of {max(lengths)} tokens")
    if unknown:
        raise EnvironmentProblem(f"{kind} uses {', '.join(unknown)}, which row attention does not have; use attention: sdpa.")


def _limit_in_mask(module: nn.Module, settings: dict[str, Any]) -> int | None:
    """The window or chunk of a model that does not hand it on to its attention (Qwen2-MoE, Llama 4), or None."""
    if "sliding_window" in settings:
        return None
    config = getattr(module, "config", None)
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


class _CausalRows(torch.autograd.Function):
    """softmax(s·Q·Kᵀ + causal mask)·V of each row by torch's CPU flash kernel in fp32; saves Q, K, V, O in their own dtype.

    Grouped queries: head h = kv·G + g attends to key head kv. The groups stand in the batch dimension over an expanded (not
    copied) K and V, and dK, dV are summed over it. The result is (1, tokens, heads, d).
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


def _band(n: int, window: int | None, device: torch.device) -> Tensor:
    """True where query i may see key j: j ≤ i and, with a window, i − j < window. (n, n)"""
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, window: int | None) -> Tensor:
    """Gemma 2's attention: scores are squeezed by cap·tanh(score / cap) before the mask; softmax in fp32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.tanh((q @ k.transpose(-1, -2)) * (scale / cap)) * cap
    scores = scores.masked_fill(~_band(q.shape[2], window, q.device), float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
