"""Two pieces of a transformer block as one autograd function each: the gated MLP with its three pairs, and RMSNorm.

Fusing saves casts and memory, not formulas: the low-rank products are those of core/math, over any FrozenBase. A GatedMlp keeps
x, the gate and the up projection; the activation and its product are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakeet.core.base import FrozenBase, matmul_each
from lorakeet.core.layers import LoraLinear, StandIn, base_of
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import add_low_rank, grad_of_b, shrink_grad
from lorakeet.core.native import ops
from lorakeet.core.selection import Share


@dataclass(frozen=True)
class Activation:
    """φ and its backward: grad (like x) and x to grad·φ'(x), written into grad."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    native: bool = False  # whether core/native has it


def _gelu_backward(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    return cast(Tensor, torch.ops.aten.gelu_backward(grad, x, approximate=approximate, grad_input=grad))


ACTIVATIONS = {
    "silu": Activation(
        nn.functional.silu, lambda grad, x: cast(Tensor, torch.ops.aten.silu_backward(grad, x, grad_input=grad)), native=True
    ),
    "gelu_tanh": Activation(
        partial(nn.functional.gelu, approximate="tanh"), partial(_gelu_backward, approximate="tanh")
    ),
    "gelu": Activation(nn.functional.gelu, partial(_gelu_backward, approximate="none")),
}


@dataclass(frozen=True)
class Projections:
    """What a gated MLP multiplies with: three frozen weights, φ, the dtype of the products, and which tokens use which pairs.

    `parts` are slices of the tokens, each with the scales of its gate, up and down pair; tokens in none use the bare base.
    """

    gate: FrozenBase
    up: FrozenBase
    down: FrozenBase
    activation: Activation
    products: torch.dtype
    parts: tuple[tuple[slice, tuple[float, float, float]], ...]


@dataclass(frozen=True)
class Normed:
    """How y = w ∘ (x·ρ) came about. What is multiplied with y may keep x and ρ, which are kept anyway, and make y again."""

    x: Tensor
    rho: Tensor
    weight: Tensor
    version: int = 0  # of y, when this was noted: what was changed in place since is another y

    @staticmethod
    def of(y: Tensor) -> Normed | None:
        """What a FrozenRmsNorm noted on its result, its rows end to end; None for any other tensor."""
        found = cast("Normed | None", getattr(y, _NOTE, None))
        if found is None or found.version != y._version:
            return None
        return Normed(found.x.flatten(0, -2), found.rho.flatten(0, -2), found.weight)


def kept_of(y: Tensor, normed: Normed | None) -> tuple[Tensor, ...]:
    """What to save of `y` for the backward pass: itself, or what it was normed from."""
    return (y,) if normed is None else (normed.x, normed.rho, normed.weight)


def made_again(kept: Sequence[Tensor]) -> Tensor:
    """y, to the last bit, from what `kept_of` gave."""
    if len(kept) == 1:
        return kept[0]
    x, rho, weight = kept
    if ops.serves(x.dtype, x, weight):
        return cast(Tensor, ops.NORM_AGAIN(x, rho, weight))
    return weight * (x.float() * rho).to(x.dtype)


_NOTE = "lorakeet_normed"
COLUMNS = 2048  # of the inner width, at once


class GatedMlpFunction(torch.autograd.Function):
    """y = D(φ(G(x)) ∘ U(x)) where G, U, D are frozen products with pairs:  P(x) = x·Wᵀ + s·x·Aᵀ·Bᵀ on the tokens of each part.

    With g = G(x), u = U(x), h = φ(g) ∘ u and ∂L/∂y given, the chain rule reads

        ∂h = ∂y·D'     ∂u = ∂h ∘ φ(g)     ∂g = ∂h ∘ u ∘ φ'(g)     ∂x = ∂g·G' + ∂u·U'      P' = W + s·B·A, never formed

    and each pair's ∂A, ∂B are those of LowRankLinear on the tokens of its part. Saved: x (or what it was normed from), g and u
    in the dtype of x, and the rank-sized products; without pairs only g and u. h is computed again. One cast of x serves both
    projections, one product with both A's shrinks it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: Projections, normed: Normed | None, *factors: Tensor) -> Tensor:
        p, dtype = projections, projections.products
        parts = list(_by_part(p, factors))
        wide = x.to(dtype)
        gate, up = matmul_each((p.gate, p.up), wide)
        shrunk: list[Tensor] = []  # of each part: x·Aᵀ for gate and for up, and h·Aᵀ for down
        for (part, scales), (a_gate, b_gate, a_up, b_up, _, _) in parts:
            both = torch.mm(wide[part], torch.cat([a_gate, a_up]).t())  # (tokens of the part, rank + rank)
            for_gate, for_up = (half.contiguous() for half in torch.split(both, [len(a_gate), len(a_up)], dim=1))
            add_low_rank(gate[part], for_gate, b_gate, scales[0])
            add_low_rank(up[part], for_up, b_up, scales[1])
            shrunk += [for_gate, for_up]
        inner = _gated(p.activation, gate, up)
        y = p.down.matmul(inner)
        for (part, scales), (*_, a_down, b_down) in parts:
            for_down = torch.mm(inner[part], a_down.t())
            add_low_rank(y[part], for_down, b_down, scales[2])
            shrunk.append(for_down)
        source = kept_of(x, normed) if p.parts else ()
        ctx.save_for_backward(gate.to(x.dtype), up.to(x.dtype), *source, *shrunk, *factors)
        ctx.projections, ctx.source = p, len(source)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p: Projections = ctx.projections
        count = len(p.parts)
        gate, up, *rest = ctx.saved_tensors
        dtype, x, rest = gate.dtype, rest[: ctx.source], rest[ctx.source :]
        into, for_down, factors = rest[: 2 * count], rest[2 * count : 3 * count], rest[3 * count :]
        grad, gate, up = grad.to(p.products).contiguous(), gate.to(p.products), up.to(p.products)
        grad_inner = p.down.matmul_t(grad)
        through, of_down = [], []  # u, and ∂A and ∂B, of each part
        parts = list(_by_part(p, factors))
        for ((part, scales), (*_, a_down, b_down)), h in zip(parts, for_down, strict=True):
            u, grad_b = _through(grad[part], b_down, h, scales[2])
            grad_inner[part].addmm_(u, a_down)
            through.append((part, u))
            of_down.append(grad_b)
        del grad
        grad_gate, grad_up, of_a = _gated_backward(p.activation, gate, up, grad_inner, through)
        del gate, up, grad_inner
        wide = made_again(x).to(p.products) if x else grad_gate  # which only the gradients of pairs need
        need_x = ctx.needs_input_grad[0]
        grad_x = p.gate.matmul_t(grad_gate).add_(p.up.matmul_t(grad_up)) if need_x else None
        grads: list[Tensor] = []
        for number, ((part, scales), (a_gate, b_gate, a_up, b_up, _, _)) in enumerate(parts):
            u_gate, grad_b_gate = _through(grad_gate[part], b_gate, into[2 * number], scales[0])
            u_up, grad_b_up = _through(grad_up[part], b_up, into[2 * number + 1], scales[1])
            both = torch.cat([u_gate, u_up], dim=1)  # (tokens of the part, rank + rank)
            grad_a_gate, grad_a_up = torch.split(torch.mm(both.t(), wide[part]), [len(a_gate), len(a_up)])
            if grad_x is not None:
                grad_x[part].addmm_(both, torch.cat([a_gate, a_up]))
            grads += [grad_a_gate, grad_b_gate, grad_a_up, grad_b_up, of_a[number], of_down[number]]
        found = (grad.to(factor.dtype) for grad, factor in zip(grads, factors, strict=True))
        return None if grad_x is None else grad_x.to(dtype), None, None, *found


def _by_part(
    p: Projections, factors: Sequence[Tensor]
) -> Iterator[tuple[tuple[slice, tuple[float, float, float]], tuple[Tensor, ...]]]:
    """Each part of the tokens with its six factors, in the dtype of the products."""
    for number, part in enumerate(p.parts):
        yield part, tuple(factor.to(p.products) for factor in factors[6 * number : 6 * number + 6])


def _gated(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """φ(gate) ∘ up (tokens, width)."""
    if activation.native and ops.serves(gate.dtype, gate, up):
        return cast(Tensor, ops.GATED(gate, up))
    return activation.forward(gate).mul_(up)


def _gated_backward(
    activation: Activation, gate: Tensor, up: Tensor, grad: Tensor, through: Sequence[tuple[slice, Tensor]]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """∂g and ∂u of φ(g) ∘ u from its gradient, and uᵀ·h of each part's u (tokens, rank). Overwrites what it is given."""
    if activation.native and ops.serves(gate.dtype, gate, up, grad):
        ops.GATED_BACKWARD(gate, up, grad)
        torch.autograd.graph.increment_version([gate, up, grad])  # so that another backward pass through them is refused
        return gate, up, [torch.mm(u.t(), grad[part]) for part, u in through]
    active = activation.forward(gate)
    of_a = [_times_product(u.t(), active[part], up[part]) for part, u in through]
    grad_gate = activation.backward(up.mul_(grad), gate)
    return grad_gate, active.mul_(grad), of_a


def _times_product(left: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """left (rank, tokens) · (one ∘ other) (tokens, width) to (rank, width); one ∘ other is never whole."""
    parts = zip(torch.split(one, COLUMNS, dim=1), torch.split(other, COLUMNS, dim=1), strict=True)
    return torch.cat([torch.mm(left, a * b) for a, b in parts], dim=1)


def _through(grad: Tensor, b: Tensor, shrunk: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """u = s·∂y·B (tokens, rank) and ∂B = s·∂yᵀ·(x·Aᵀ) (out, rank)."""
    return shrink_grad(grad, b, scale), grad_of_b(grad, shrunk, scale)


class GatedMlp(StandIn):
    """Stands for an MLP of transformers with gate_proj, up_proj, down_proj.

    Fused where all three carry plain pairs of the same adapters, and in training where none carries anything; anything else is
    left to the original's own code.
    """

    only: Tensor | None = None  # (n,): the tokens whose results anybody reads; the others' are zeros

    def __init__(self, original: nn.Module, activation: str) -> None:
        super().__init__(original)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.only is None:
            return self._of(x)
        return spread(self._of(x.flatten(0, -2).index_select(0, self.only)), self.only, x.shape)

    def _of(self, x: Tensor) -> Tensor:
        """The MLP of every token of x (…, hidden)."""
        flat = x.reshape(-1, x.shape[-1])
        layers = [getattr(self.original, name) for name in ("gate_proj", "up_proj", "down_proj")]
        divided = any(isinstance(layer, LoraLinear) and layer.selection.shares is not None for layer in layers)
        if divided and not torch.is_grad_enabled():  # the layers by themselves stack short shares (core/layers)
            return cast(Tensor, self.original(x))
        parts = _shared_parts(layers, len(flat))
        bases = [cast(LoraLinear, layer).base for layer in layers] if parts else _frozen_bases(layers, flat, self.activation)
        if not bases:
            return cast(Tensor, self.original(x))
        gate, up, down = bases
        scaled = tuple((part, cast("tuple[float, float, float]", scales)) for part, scales, _ in parts)
        products = cast("torch.dtype | None", getattr(layers[0], "products", None))
        projections = Projections(gate, up, down, self.activation, products or x.dtype, scaled)
        factors = [factor for _, _, held in parts for factor in held]
        y = cast(Tensor, GatedMlpFunction.apply(flat, projections, Normed.of(x), *factors))  # type: ignore[no-untyped-call]
        return y.view(x.shape)


def spread(found: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """(n, hidden) at `places` (n,), each named once, of the tokens of a tensor of `shape` (…, hidden), and zeros elsewhere."""
    return found.new_zeros(shape).flatten(0, -2).index_copy(0, places, found).view(shape)


def _frozen_bases(layers: Sequence[nn.Module], x: Tensor, activation: Activation) -> list[FrozenBase]:
    """The weights of layers that only hand gradients on, each dense or packed; empty where there is nothing to save by that.

    The layers' own code keeps what the activation gives beside what it was given. It also rounds that, where the native gate does
    not: with the gate there is one way, with gradients and without, since a streamed block goes both.
    """
    native = activation.native and ops.serves(x.dtype, x)
    if not (native or (torch.is_grad_enabled() and x.requires_grad)):
        return []
    if any(getattr(layer, "bias", None) is not None for layer in layers):
        return []
    if any(getattr(layer, "products", None) not in (None, x.dtype) for layer in layers):
        return []  # whose own code rounds between two products, without gradients and so in a streamed forward pass too
    if all(type(layer) is nn.Linear and not layer.weight.requires_grad and layer.weight.dtype == x.dtype for layer in layers):
        return [base_of(layer, "linear") for layer in layers]
    packed = [None if isinstance(layer, LoraLinear) else getattr(layer, "base", None) for layer in layers]
    return [] if None in packed else cast("list[FrozenBase]", packed)


def _shared_parts(layers: Sequence[nn.Module], tokens: int) -> list[tuple[slice, tuple[float, ...], list[Tensor]]]:
    """(tokens, scales, factors) of each part of a batch; empty unless all layers have plain pairs for the same parts."""
    uses = [_plain_uses(layer, tokens) for layer in layers]
    if not all(uses) or len({tuple((share.start, share.stop, share.name, share.weight) for share, _ in use) for use in uses}) > 1:
        return []
    found = []
    for together in zip(*uses, strict=True):
        share = together[0][0]
        scales = tuple(share.weight * pair.scale for _, pair in together)
        factors = [factor for _, pair in together for factor in pair.factors()]
        found.append((slice(share.start, share.stop), scales, factors))
    return found


def _plain_uses(layer: nn.Module, tokens: int) -> list[tuple[Share, LoraPair]]:
    """Which tokens use which pair of a layer; empty where one of them is more than A and B, or the layer has a bias."""
    if not isinstance(layer, LoraLinear) or layer.bias is not None:
        return []
    uses = layer.divided(tokens) if layer.selection.shares is not None else []
    active = layer.active
    if active is not None:
        uses = [(Share(0, tokens, active), cast(LoraPair, layer.adapters[active]))]
    return uses if all(pair.plain for _, pair in uses) else []


class RmsNormFunction(torch.autograd.Function):
    """(y, ρ): y = w ∘ x̂, x̂ = x·ρ, ρ = 1/√(mean(x²) + ε), in fp32;  ∂x = ρ·(w∘∂y − x̂·mean(w∘∂y∘x̂)). Saves x and ρ; w is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        if ops.serves(x.dtype, x, weight):
            y, rho = ops.NORM(x, weight, epsilon)
        else:
            wide = x.float()
            rho = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(epsilon))
            y = weight * wide.mul_(rho).to(x.dtype) if wide is not x else weight * (wide * rho)
        ctx.save_for_backward(x, rho, weight)
        ctx.mark_non_differentiable(rho)
        return y, rho

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, None, None]:
        x, rho, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        if ops.serves(x.dtype, x, weight, grad):
            return ops.NORM_BACKWARD(grad, x, rho, weight), None, None
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
        y, rho = cast("tuple[Tensor, Tensor]", RmsNormFunction.apply(x, self.weight, epsilon))  # type: ignore[no-untyped-call]
        if torch.is_grad_enabled():
            setattr(y, _NOTE, Normed(x.detach(), rho, self.weight, y._version))
        return y
