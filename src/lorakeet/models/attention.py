"""Causal attention over rows laid end to end: no padding, no attention across rows. Registered with transformers by name.

The model runs on one sequence (1, tokens) with `row_lengths=(n₁, n₂, …)` among its keyword arguments and position ids that
begin again at each row. Each row attends to itself alone, so the cost is Σn² and not (Σn)².

On a CPU the bf16 backward of torch's flash kernel is about three times slower than its fp32 one (measured: docs/log.md), so
rows are computed in fp32 there and kept in the model's dtype between forward and backward.
"""

from __future__ import annotations

import math
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
    outputs = []
    for q, k, v in zip(*(torch.split(states, list(rows), dim=2) for states in (query, key, value)), strict=True):
        masked = window is not None and q.shape[2] > window
        if softcap is not None:
            out = _softcapped(q, k, v, scale, softcap, window)
        elif masked or dropout > 0 or q.device.type != "cpu":
            mask = _band(q.shape[2], window, q.device) if masked else None
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        else:
            out = cast(Tensor, _CausalRow.apply(q, k, v, scale))  # type: ignore[no-untyped-call]
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
    if unknown:
        raise EnvironmentProblem(f"{kind} uses {', '.join(unknown)}, which row attention does not have; use attention: sdpa.")


class _CausalRow(torch.autograd.Function):
    """softmax(s·Q·Kᵀ + causal mask)·V of one row by torch's CPU flash kernel in fp32; saves Q, K, V, O in their own dtype.

    Grouped queries: head h = kv·G + g attends to key head kv. The groups stand in the batch dimension over an expanded (not
    copied) K and V, and dK, dV are summed over it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _by_group(q.float(), groups), *_expanded(k, v, groups), 0.0, True, scale=scale
        )
        result = _by_head(out).to(q.dtype)
        ctx.save_for_backward(q, k, v, result, logsumexp)
        ctx.scale, ctx.groups = scale, groups
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, result, logsumexp = ctx.saved_tensors
        groups = ctx.groups
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _by_group(grad.float(), groups),
            _by_group(q.float(), groups),
            *_expanded(k, v, groups),
            _by_group(result.float(), groups),
            logsumexp,
            0.0,
            True,
            scale=ctx.scale,
        )
        grads = _by_head(grad_q), grad_k.sum(0, keepdim=True), grad_v.sum(0, keepdim=True)
        return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype), None


def _by_group(states: Tensor, groups: int) -> Tensor:
    """(1, kv·groups, n, d) to (groups, kv, n, d)."""
    _, heads, n, d = states.shape
    return states.view(heads // groups, groups, n, d).transpose(0, 1)


def _by_head(states: Tensor) -> Tensor:
    """(groups, kv, n, d) back to (1, kv·groups, n, d)."""
    groups, kv, n, d = states.shape
    return states.transpose(0, 1).reshape(1, kv * groups, n, d)


def _expanded(k: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return k.float().expand(groups, -1, -1, -1), v.float().expand(groups, -1, -1, -1)


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
