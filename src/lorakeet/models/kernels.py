"""Triton kernels for a loaded model: whether they can be had, which weights use them, and a proof on the model's own weights.

No test here ran on a GPU, so a model that asks for them shows on its own device that they compute what torch computes, before
they are used: one weight of each kind and shape, brought back bit for bit, multiplied forwards and backwards to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.core.base import DenseBase
from lorakeet.core.in_tiles import Kernels
from lorakeet.core.kernels import low_rank_product, low_rank_product_t, why_not
from lorakeet.core.layers import LoraLinear
from lorakeet.core.math import add_low_rank, shrink_grad
from lorakeet.errors import EnvironmentProblem
from lorakeet.models import modules
from lorakeet.models.placement import device_for
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.packed import PackedBase, PackedLinear

TOKENS, RANK, SCALE = 8, 8, 1.5  # of the proof
ROWS = 256  # of W that are compared at either end
WEIGHTS = "the first rows of W", "the last rows of W"
ROUNDINGS = 4  # relative to the largest result: torch rounds a sum on the way that the kernel does not, and adds in another order


def kernels_for(spec: ModelSpec, device: torch.device) -> Kernels | None:
    """The kernels that the settings ask for, None for torch's own; EnvironmentProblem where they cannot run."""
    if spec.kernels == "torch":
        return None
    reason = why_not(device)
    if reason:
        raise EnvironmentProblem(f"model.kernels is triton: {reason}")
    return Kernels(spec.fused_tokens)


def where_possible(spec: ModelSpec) -> ModelSpec:
    """`spec` with torch's own kernels where those that it asks for cannot run: for settings that were made on another machine."""
    return spec if spec.kernels == "torch" or not why_not(device_for(spec.device)) else replace(spec, kernels="torch")


def use_kernels(model: nn.Module, kernels: Kernels | None) -> None:
    """Lets every packed weight, and every weight that carries pairs, use the kernels; None: none of them."""
    for base in bases_of(model):
        base.kernels = kernels


def bases_of(model: nn.Module) -> Iterator[Any]:
    """The frozen weights of `model` that could: each a PackedBase or a DenseBase."""
    for _, layer in modules.adapted_layers(model):
        if isinstance(layer, LoraLinear) and isinstance(layer.base, (PackedBase, DenseBase)):
            yield layer.base
    for _, module in modules.original_modules(model):
        if isinstance(module, PackedLinear):
            yield module.base


def check_kernels(parts: Iterable[nn.Module], kernels: Kernels, products: torch.dtype) -> None:
    """EnvironmentProblem unless the kernels compute on these modules what torch does, over one weight of each kind and shape."""
    seen = set()
    for part in parts:
        for module in part.modules():
            if isinstance(module, PackedLinear):
                base: Any = module.base
                kind, device = str(base.settings), base.device
            elif type(module) is nn.Linear:
                base = DenseBase(module)
                kind, device = f"dense {base.shape}", base.weight.device
            else:
                continue
            if kind not in seen and device.type != "meta":
                seen.add(kind)
                _check(base, kernels, products, kind, device)


@torch.no_grad()
def _check(base: Any, kernels: Kernels, products: torch.dtype, kind: str, device: torch.device) -> None:
    before = base.kernels
    try:
        base.kernels = None
        expected = _computed(base, products, device)
        base.kernels = kernels
        found = _computed(base, products, device)
    finally:
        base.kernels = before
    rounding = ROUNDINGS * (torch.finfo(products).eps + max(base.shape) ** 0.5 * torch.finfo(torch.float32).eps)
    for name, mine in found.items():
        theirs = expected[name].float()
        worst = float((mine.float() - theirs).abs().max())
        allowed = 0.0 if name in WEIGHTS else rounding * float(theirs.abs().max())
        if not worst <= allowed:
            raise EnvironmentProblem(
                f"Lorakeet's Triton kernels compute {name} otherwise than torch on this device, for a weight {kind}: the "
                f"largest difference is {worst:.3g}, where rounding explains {allowed:.3g}. Set model.kernels to torch, and "
                "please report it."
            )


def _computed(base: Any, products: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Rows of W at both ends of a packed base, and what a pair over the base gives forwards and backwards, for numbers that are
    always the same."""
    out, inner = base.shape
    a, b, x, grad = (
        numbers.to(products)
        for numbers in (
            _numbers(RANK, inner, device) / inner**0.5,
            _numbers(out, RANK, device) / RANK,
            _numbers(TOKENS, inner, device),
            _numbers(TOKENS, out, device),
        )
    )
    forwards = low_rank_product(base, x, a, b, SCALE)
    if forwards is None:
        shrunk = torch.mm(x, a.t())
        forwards = add_low_rank(base.matmul(x), shrunk, b, SCALE), shrunk
    backwards = low_rank_product_t(base, grad, a, b, SCALE)
    if backwards is None:
        u = shrink_grad(grad, b, SCALE)
        backwards = base.matmul_t(grad).addmm_(u, a), u
    named = dict(zip(("y", "x·Aᵀ", "∂L/∂x", "s·g·B"), (*forwards, *backwards), strict=True))
    if isinstance(base, PackedBase):
        last = max(0, out - ROWS) // base.row_step * base.row_step
        for name, first, stop in zip(WEIGHTS, (0, last), (min(out, ROWS), out), strict=True):
            named[name] = base.unpack(torch.empty((stop - first, inner), dtype=products, device=device), first)
    return named


def _numbers(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) of normal fp32 numbers, the same on every machine."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)).to(device)
