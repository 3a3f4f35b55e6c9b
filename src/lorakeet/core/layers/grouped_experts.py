"""All experts of a block in grouped products: the tokens sorted by expert, one launch where each expert would have its own.

    y_t = x_t·W_eᵀ + s·x_t·A_eᵀ·B_eᵀ   for the expert e of each row t; rows of an expert lie together, `ends` says where each ends

torch's grouped product (`torch._grouped_mm`) takes the ends from the device in bf16 on compute capability 9 and 10, so that the
host waits for nothing. For other types and GPUs it reads them on the host, in each product, and multiplies expert by expert:
it is not used there. Before its first use it is compared with products expert by expert. **Not run on a GPU yet.**
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakeet.core.gpu_pairs import copy_of
from lorakeet.kernels.proof import difference_found

CAPABILITIES, MULTIPLE = (9, 10), 8  # of a GPU, major numbers; of every width and rank
PROOF = (3, 0, 5), 32, 16, 8  # rows of made-up experts, widths and a rank
CLOSE = 3e-2  # relative to the largest number: a few roundings of bf16


class Sorted(NamedTuple):
    """The choices of all tokens, sorted by expert. A dropped choice (its index is past the last expert) counts as one of the
    last, with a weight of 0.
    """

    tokens: Tensor  # (n,): whose choice it is
    experts: Tensor  # (n,)
    weights: Tensor  # (n, 1)
    ends: Tensor  # (experts,) int32: where the choices of each end

    @staticmethod
    def of(top_k_index: Tensor, top_k_weights: Tensor, count: int) -> Sorted:
        """From each token's choices (tokens, k) and their weights (tokens, k)."""
        wanted = top_k_index.flatten()
        experts, order = wanted.clamp(max=count - 1).sort(stable=True)
        weights = torch.where(wanted < count, top_k_weights.flatten(), 0).index_select(0, order)[:, None]
        ends = torch.searchsorted(experts, torch.arange(count, device=experts.device), right=True, out_int32=True)
        return Sorted(order // top_k_index.shape[1], experts, weights, ends)


class GroupedLowRank(torch.autograd.Function):
    """y (n, out) of rows x (n, in) over a frozen W (experts, out, in), with or without A (experts, rank, in) and B (experts, out,
    rank).

    With g = ∂L/∂y, h = x·Aᵀ and u = s·g·B, all by expert:  ∂B = s·gᵀ·h   ∂A = uᵀ·x   ∂x = g·W + u·A
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - apply() takes positional arguments only
        ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, scale: float, A: Tensor | None, B: Tensor | None
    ) -> Tensor:
        y = grouped_product(x, weight.mT, ends)
        copies: tuple[Tensor, ...] = ()
        if A is not None and B is not None:
            copies = copy_of([A], x.dtype), copy_of([B], x.dtype)
            h = grouped_product(x, copies[0].mT, ends)
            y.add_(grouped_product(h, copies[1].mT, ends), alpha=scale)
            ctx.save_for_backward(x, h, ends)
            ctx.dtypes = A.dtype, B.dtype
        else:
            ctx.save_for_backward(ends)
        ctx.weight, ctx.copies, ctx.scale = weight, copies, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        *states, ends = ctx.saved_tensors
        grad_x = grouped_product(grad, ctx.weight, ends) if ctx.needs_input_grad[0] else None
        if not ctx.copies:
            return grad_x, None, None, None, None, None
        (x, h), (A, B) = states, ctx.copies
        u = grouped_product(grad, B, ends).mul_(ctx.scale)
        of_a = grouped_product(u.t(), x, ends).to(ctx.dtypes[0])
        of_b = grouped_product(grad.t(), h, ends).to(ctx.dtypes[1]).mul_(ctx.scale)
        if grad_x is not None:
            grad_x.add_(grouped_product(u, A, ends))
        return grad_x, None, None, None, of_a, of_b


def grouped_low_rank(x: Tensor, weight: Tensor, ends: Tensor, pair: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """x (n, in), sorted by expert, to (n, out); `pair` is A, B and their scale."""
    A, B, scale = pair or (None, None, 1.0)
    return cast(Tensor, GroupedLowRank.apply(x, weight, ends, scale, A, B))  # type: ignore[no-untyped-call]


def why_not_grouped(x: Tensor, products: torch.dtype | None, widths: tuple[int, ...]) -> str:
    """Why rows x are not multiplied in grouped products, with weights and pairs of these widths; empty where they are."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or products not in (None, torch.bfloat16):
        return "they take bfloat16 on a CUDA device"
    if any(width % MULTIPLE for width in widths):
        return f"they take widths and ranks in multiples of {MULTIPLE}; these are {', '.join(map(str, widths))}"
    if not hasattr(torch, "_grouped_mm") or torch.cuda.get_device_capability(x.device)[0] not in CAPABILITIES:
        return "they need a GPU of compute capability 9 or 10, and a torch that has them"
    return "" if grouped_product_proved(x.device) else "they do not compute what products expert by expert do"


@functools.cache
def grouped_product_proved(device: torch.device) -> bool:
    """True if grouped products of made-up experts are those of each expert alone; else one warning says so."""
    if said := difference_found(lambda: _difference(device)):
        logging.getLogger("lorakeet").warning(
            "Torch's grouped product %s. Experts are multiplied one by one: the host waits in each block. Please report it.",
            said,
        )
    return not said


def _difference(device: torch.device) -> str:
    rows, width, out, rank = PROOF
    draw = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, torch.bfloat16)

    x, weight, A, B = (numbers(sum(rows), width), numbers(len(rows), out, width), numbers(len(rows), rank, width),
                       numbers(len(rows), out, rank))  # fmt: skip
    ends = torch.tensor(rows, device=device).cumsum(0).int()
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [each.requires_grad_() for each in (x, A, B)]
        found = grouped_low_rank(x, weight, ends, (A, B, 0.5))
        upstream = numbers(*found.shape)
        mine = found, *torch.autograd.grad(found, leaves, upstream)
        parts = [
            part @ (weight[number] + 0.5 * B[number] @ A[number]).t() for number, part in enumerate(torch.split(x, list(rows)))
        ]
        whole = torch.cat(parts)
        theirs = whole, *torch.autograd.grad(whole, leaves, upstream)
    for name, one, other in zip(("y", "∂x", "∂A", "∂B"), mine, theirs, strict=True):
        worst, allowed = (one.float() - other.float()).abs().max().item(), CLOSE * other.float().abs().max().item()
        if not worst <= allowed:
            return f"computes {name} otherwise than each expert does: by {worst:.3g}, where rounding explains {allowed:.3g}"
    return ""


def grouped_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Rows (n, ·) times matrices (experts, ·, ·), or columns (·, n) times rows (n, ·), by groups that end at `ends`."""
    return torch._grouped_mm(left, right, offs=ends)
