"""Two pieces of a transformer block as one autograd function each: the gated MLP with its three pairs, and RMSNorm.

Fusing saves casts and memory, not formulas: the low-rank products are those of core/math, over any FrozenBase. A GatedMlp keeps
x, the gate and the up projection; the activation and its product are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.base import FrozenBase
from lorakeet.core.layers import LoraLinear, StandIn
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import add_low_rank, grad_of_b, shrink_grad


@dataclass(frozen=True)
class Activation:
    """φ and its backward: grad (like x) and x to grad·φ'(x)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(nn.functional.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": Activation(
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        lambda grad, x: cast(Tensor, torch.ops.aten.gelu_backward(grad, x, approximate="tanh")),
    ),
    "gelu": Activation(nn.functional.gelu, lambda grad, x: cast(Tensor, torch.ops.aten.gelu_backward(grad, x))),
}


@dataclass(frozen=True)
class Projections:
    """What a gated MLP multiplies with: three frozen weights, the scale of each pair, φ, and the dtype of the products."""

    gate: FrozenBase
    up: FrozenBase
    down: FrozenBase
    scales: tuple[float, float, float]
    activation: Activation
    products: torch.dtype


class GatedMlpFunction(torch.autograd.Function):
    """y = D(φ(G(x)) ∘ U(x)) where G, U, D are frozen products with a pair each:  P(x) = x·Wᵀ + s·x·Aᵀ·Bᵀ.

    With g = G(x), u = U(x), h = φ(g) ∘ u and ∂L/∂y given, the chain rule reads

        ∂h = ∂y·D'     ∂u = ∂h ∘ φ(g)     ∂g = ∂h ∘ u ∘ φ'(g)     ∂x = ∂g·G' + ∂u·U'      P' = W + s·B·A, never formed

    and each pair's ∂A, ∂B are those of LowRankLinear. Saved: x, g, u in the dtype of x, and the rank-sized products. h is
    computed again. One cast of x serves both projections, one product with both A's shrinks it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: Projections, *factors: Tensor) -> Tensor:
        p, dtype = projections, projections.products
        a_gate, b_gate, a_up, b_up, a_down, b_down = (factor.to(dtype) for factor in factors)
        wide = x.to(dtype)
        shrunk = torch.mm(wide, torch.cat([a_gate, a_up]).t())  # (tokens, rank + rank)
        ranks = [a_gate.shape[0], a_up.shape[0]]
        for_gate, for_up = (part.contiguous() for part in torch.split(shrunk, ranks, dim=1))
        gate = add_low_rank(p.gate.matmul(wide), for_gate, b_gate, p.scales[0])
        up = add_low_rank(p.up.matmul(wide), for_up, b_up, p.scales[1])
        inner = p.activation.forward(gate).mul_(up)
        for_down = torch.mm(inner, a_down.t())
        y = add_low_rank(p.down.matmul(inner), for_down, b_down, p.scales[2])
        ctx.save_for_backward(x, gate.to(x.dtype), up.to(x.dtype), for_gate, for_up, for_down, *factors)
        ctx.projections = p
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, for_gate, for_up, for_down, *factors = ctx.saved_tensors
        p: Projections = ctx.projections
        a_gate, b_gate, a_up, b_up, a_down, b_down = (factor.to(p.products) for factor in factors)
        grad, gate, up = grad.to(p.products).contiguous(), gate.to(p.products), up.to(p.products)
        active = p.activation.forward(gate)
        u_down, grad_b_down = _through(grad, b_down, for_down, p.scales[2])
        grad_a_down = torch.mm(u_down.t(), active * up)
        grad_inner = p.down.matmul_t(grad).addmm_(u_down, a_down)
        grad_gate = p.activation.backward(up.mul_(grad_inner), gate)
        grad_up = active.mul_(grad_inner)
        u_gate, grad_b_gate = _through(grad_gate, b_gate, for_gate, p.scales[0])
        u_up, grad_b_up = _through(grad_up, b_up, for_up, p.scales[1])
        both = torch.cat([u_gate, u_up], dim=1)  # (tokens, rank + rank)
        grad_a_gate, grad_a_up = torch.split(torch.mm(both.t(), x.to(p.products)), [a_gate.shape[0], a_up.shape[0]])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = p.gate.matmul_t(grad_gate).add_(p.up.matmul_t(grad_up)).addmm_(both, torch.cat([a_gate, a_up])).to(x.dtype)
        grads = (grad_a_gate, grad_b_gate, grad_a_up, grad_b_up, grad_a_down, grad_b_down)
        return grad_x, None, *(found.to(factor.dtype) for found, factor in zip(grads, factors, strict=True))


def _through(grad: Tensor, b: Tensor, shrunk: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """u = s·∂y·B (tokens, rank) and ∂B = s·∂yᵀ·(x·Aᵀ) (out, rank)."""
    return shrink_grad(grad, b, scale), grad_of_b(grad, shrunk, scale)


class GatedMlp(StandIn):
    """Stands for an MLP of transformers with gate_proj, up_proj, down_proj; fused where all three carry a plain active pair."""

    def __init__(self, original: nn.Module, activation: str) -> None:
        super().__init__(original)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        layers = [cast(LoraLinear, getattr(self.original, name)) for name in ("gate_proj", "up_proj", "down_proj")]
        pairs = [_plain_pair(layer) for layer in layers]
        if any(pair is None for pair in pairs):
            return cast(Tensor, self.original(x))
        gate, up, down = (layer.base for layer in layers)
        scales = cast("tuple[float, float, float]", tuple(cast(LoraPair, pair).scale for pair in pairs))
        projections = Projections(gate, up, down, scales, self.activation, layers[0].products or x.dtype)
        factors = [factor for pair in pairs for factor in cast(LoraPair, pair).factors()]
        y = cast(Tensor, GatedMlpFunction.apply(x.reshape(-1, x.shape[-1]), projections, *factors))  # type: ignore[no-untyped-call]
        return y.view(x.shape)


def _plain_pair(layer: nn.Module) -> LoraPair | None:
    """The active pair if it is plain LoRA without dropout or biases, which the fused function covers; else None."""
    pair = layer.pair() if isinstance(layer, LoraLinear) else None
    return pair if pair is not None and pair.plain and cast(LoraLinear, layer).bias is None else None


class RmsNormFunction(torch.autograd.Function):
    """y = w ∘ x̂ with x̂ = x·ρ, ρ = 1/√(mean(x²) + ε), in fp32;  ∂x = ρ·(w∘∂y − x̂·mean(w∘∂y∘x̂)). Saves x and ρ; w is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        rho = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(epsilon))
        ctx.save_for_backward(x, rho, weight)
        return weight * (wide * rho).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x, rho, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        scaled = grad.float() * weight.float()
        normal = x.float() * rho
        share = (scaled * normal).mean(-1, keepdim=True)
        return scaled.addcmul_(normal, share, value=-1).mul_(rho).to(x.dtype), None, None


class FrozenRmsNorm(StandIn):
    """Stands for a frozen RMSNorm with `weight` and `variance_epsilon`."""

    @property
    def weight(self) -> Tensor:
        """The frozen gain."""
        return cast(Tensor, self.original.weight)

    def forward(self, x: Tensor) -> Tensor:
        epsilon = cast(float, self.original.variance_epsilon)
        return cast(Tensor, RmsNormFunction.apply(x, self.weight, epsilon))  # type: ignore[no-untyped-call]
