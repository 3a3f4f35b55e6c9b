"""Sinks of attention (gpt-oss) with any GPU kernel of packed rows: the softmax of each head has one score more, which takes a
share and gives nothing.

With the O and the log-sums L that a kernel gives without a sink of score z, and ℓ = log(exp L + exp z), the result is
O' = exp(L − ℓ)·O. Its shares are exp(S − ℓ), so the kernel's own backward pass, given O' and ℓ in place of O and L, computes ∂Q,
∂K and ∂V:

    ∂S = exp(S − ℓ) ∘ (∂O'·Vᵀ − rowsum(O' ∘ ∂O'))      ∂z = −Σ exp(z − ℓ)·rowsum(O' ∘ ∂O')

This stands on log-sums that are natural ones, and on a backward pass that reads them and O. So it is compared with the definition
before its first use with a kernel on heads of a shape.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakeet.kernels.flash_varlen import CLOSE, PROOF, FlashVarlen, by_definition
from lorakeet.kernels.proof import difference_found


class SinkRows(torch.autograd.Function):
    """Attention of packed rows with sinks (heads,) by a kernel; other shapes are those of kernels/protocol.PackedAttention."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, kernel: FlashVarlen) -> Tensor:
        result, kept = rescaled(kernel, query, key, value, sinks)
        ctx.save_for_backward(query, key, value, sinks, *kept)
        ctx.kernel = kernel
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, logs = ctx.saved_tensors
        found = ctx.kernel.backward(grad, query, key, value, out, logs)
        of_sinks = None
        if ctx.needs_input_grad[3]:
            share = (sinks.float()[:, None] - ctx.kernel.log_sums(logs, len(out))).exp()  # (heads, tokens)
            of_sinks = -((grad[0].float() * out).sum(-1).t() * share).sum(1).to(sinks.dtype)
        return *(states.to(grad.dtype) for states in found), of_sinks, None


def rescaled(
    kernel: FlashVarlen, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The result (1, tokens, heads, d) with sinks, and what the kernel's backward pass needs: that result, and its log-sums."""
    _, (out, logs) = kernel.forward(query, key, value)
    scores = sinks.float()
    before = kernel.log_sums(logs, len(out))  # (heads, tokens)
    out = (out * torch.sigmoid(before - scores[:, None]).t()[..., None]).to(out.dtype)
    logs = torch.logaddexp(logs, scores.view(*(1,) * (logs.dim() - 2), -1, 1))
    return out[None], (out, logs)


def takes_sinks(kernel: type[FlashVarlen], like: Tensor, heads: int, kv: int, d: int) -> bool:
    """True for heads of d numbers where the kernel has proved to compute attention with sinks; a rehearsal assumes it."""
    few, group = min(2, kv), min(8, heads // kv)
    sizes = group * few, few, d
    return like.device.type == "cpu" or sinks_proved(cast(Hashable, kernel), like.device, like.dtype, sizes)


@functools.cache
def sinks_proved(kernel: type[FlashVarlen], device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]) -> bool:
    """True if made-up rows with sinks are computed by the kernel, both ways, as attention is defined; else one warning says so.

    `sizes` are heads, heads of keys, and a head's width.
    """
    said = difference_found(lambda: _difference(kernel, (device, dtype), sizes))
    if said:
        logging.getLogger("lorakeet").warning(
            "Torch's attention kernel %s. Attention with sinks is computed by blocks of queries, which is slower. "
            "Please report it.",
            said,
        )
    return not said


def _difference(made: type[FlashVarlen], place: tuple[torch.device, torch.dtype], sizes: tuple[int, int, int]) -> str:
    """How a kernel's results with sinks differ from the definition by more than rounding; empty if they do not."""
    (heads, kv, d), (rows, shared, window), (device, dtype) = sizes, PROOF, place
    draw, tokens = torch.Generator().manual_seed(heads), shared + sum(rows)
    q, k, v, grad = (torch.randn(1, many, tokens, d, generator=draw).to(device, dtype) for many in (heads, kv, kv, heads))
    sinks = torch.linspace(-1, 6, heads, device=device)
    kernel = made(rows, d**-0.5, shared, window)
    out, kept = rescaled(kernel, q, k, v, sinks)
    found = out, *kernel.backward(grad.transpose(1, 2), q, k, v, *kept)
    expected = by_definition((q, k, v), grad, kernel.laid[:4], sinks)
    for name, mine, theirs in zip(("O", "∂Q", "∂K", "∂V"), found, expected, strict=True):
        worst, allowed = (mine.float() - theirs).abs().max().item(), CLOSE * theirs.abs().max().item()
        if not worst <= allowed:
            return (
                f"computes {name} of rows with sinks otherwise than attention is defined on {device}: the largest difference is "
                f"{worst:.3g}, where rounding explains {allowed:.3g}"
            )
    return ""
