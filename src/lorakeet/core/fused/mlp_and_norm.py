"""The gated MLP with its three pairs, and RMSNorm, as one autograd function each.

Fusing saves casts and memory, not formulas: the low-rank products are those of core/math, over any FrozenBase. A GatedMlp saves
x, the gate and the up projection; the backward pass recomputes the activation and its product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakeet.core.base import FrozenBase, matmul_each, sum_of_matmul_t
from lorakeet.core.layers.linear import LoraLinear, Replacement, dense_base_of
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.pair_products import PairProducts, PairSpan, alternated
from lorakeet.core.selection import Share
from lorakeet.kernels.choose import elementwise_ops
from lorakeet.kernels.cpu import operators


@dataclass(frozen=True)
class Activation:
    """φ and its backward: grad (like x) and x to grad·φ'(x), written into grad."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    in_c: bool = False  # whether the blocks in C have it
    calls: tuple[str, str] | None = None  # what kernels call φ(z)∘u and its backward, in place (kernels/protocol.ElementwiseOps)

    def kernel(self, which: int, *states: Tensor) -> Callable[..., Tensor | None] | None:
        """What computes φ(z)∘u (0), or its backward in place (1), of these states in one call; None: torch."""
        if self.calls is None or (by := elementwise_ops(*states)) is None:
            return None
        return getattr(by, self.calls[which], None)


def _gelu_backward(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    return cast(Tensor, torch.ops.aten.gelu_backward(grad, x, approximate=approximate, grad_input=grad))


ACTIVATIONS = {
    "silu": Activation(
        nn.functional.silu, lambda grad, x: cast(Tensor, torch.ops.aten.silu_backward(grad, x, grad_input=grad)),
        in_c=True, calls=("gated", "gated_backward_"),
    ),
    "gelu_tanh": Activation(
        partial(nn.functional.gelu, approximate="tanh"), partial(_gelu_backward, approximate="tanh"),
        calls=("gelu_gated", "gelu_gated_backward_"),
    ),
    "gelu": Activation(nn.functional.gelu, partial(_gelu_backward, approximate="none")),
}


@dataclass(frozen=True)
class Projections:
    """The frozen weights of a gated MLP, φ, the dtype of the products, and the pairs on their tokens.

    `into` are the pairs of gate and up, `out_of` those of down; other tokens use the bare base.
    """

    gate: FrozenBase
    up: FrozenBase
    down: FrozenBase
    activation: Activation
    products: torch.dtype
    into: PairProducts
    out_of: PairProducts


@dataclass(frozen=True)
class NormInputs:
    """The inputs of y = w ∘ (x·ρ). What is multiplied with y can save x and ρ, which are saved anyway, and recompute y."""

    x: Tensor
    rho: Tensor
    weight: Tensor
    version: int = 0  # of y at that time: after a change in place y is another tensor

    @staticmethod
    def of(y: Tensor) -> NormInputs | None:
        """The inputs that a FrozenRmsNorm noted on its result, flattened to rows; None for any other tensor."""
        found = cast("NormInputs | None", getattr(y, _NOTE, None))
        if found is None or found.version != y._version:
            return None
        return NormInputs(found.x.flatten(0, -2), found.rho.flatten(0, -2), found.weight)


def saved_for(y: Tensor, made_of: NormInputs | None) -> tuple[Tensor, ...]:
    """The tensors to save for the backward pass: `y` itself, or the inputs of its norm."""
    return (y,) if made_of is None else (made_of.x, made_of.rho, made_of.weight)


def recomputed(kept: Sequence[Tensor]) -> Tensor:
    """Recomputes y, to the last bit, from the tensors of `saved_for`."""
    if len(kept) == 1:
        return kept[0]
    x, rho, weight = kept
    if (by := elementwise_ops(x, weight, by_rows=True)) is not None:
        return by.norm_again(x, rho, weight)
    return weight * (x.float() * rho).to(x.dtype)


_NOTE = "lorakeet_normed"
COLUMNS = 2048  # columns of the inner width at once
MLP = ("gate_proj", "up_proj", "down_proj")


class GatedMlpFunction(torch.autograd.Function):
    """y = D(φ(G(x)) ∘ U(x)) where G, U, D are frozen products with pairs:  P(x) = x·Wᵀ + s·x·Aᵀ·Bᵀ on the tokens of each part.

    With g = G(x), u = U(x), h = φ(g) ∘ u and ∂L/∂y given, the chain rule reads

        ∂h = ∂y·D'     ∂u = ∂h ∘ φ(g)     ∂g = ∂h ∘ u ∘ φ'(g)     ∂x = ∂g·G' + ∂u·U'      P' = W + s·B·A, never formed

    and each pair's ∂A, ∂B are those of LowRankLinear on the tokens of its part. Saved: x (or what it was normed from), g and u
    in the dtype of x, and the rank-sized products; without pairs only g and u. h is computed again. One cast of x serves both
    projections, one product with both A's shrinks it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: Projections, made_of: NormInputs | None, *factors: Tensor) -> Tensor:
        p = projections
        of_into, of_down = _factors_of(p, factors)
        wide = x.to(p.products)
        gate, up = matmul_each((p.gate, p.up), wide)
        shrunk = p.into.add([gate, up], wide, of_into)  # x·Aᵀ for gate and up
        by = p.activation.kernel(0, gate, up)
        inner = p.activation.forward(gate).mul_(up) if by is None else cast(Tensor, by(gate, up))
        y = p.down.matmul(inner)
        for_down = p.out_of.add([y], inner, of_down)  # h·Aᵀ
        source = saved_for(x, made_of) if factors else ()
        ctx.save_for_backward(gate.to(x.dtype), up.to(x.dtype), *source, *shrunk, *for_down, *factors)
        ctx.projections, ctx.counts = p, (len(source), len(shrunk), len(for_down))
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p: Projections = ctx.projections
        gate, up, *rest = ctx.saved_tensors
        ends = list(accumulate(ctx.counts, initial=0))
        x, shrunk, for_down = (rest[start:stop] for start, stop in pairwise(ends))
        dtype, (of_into, of_down) = gate.dtype, _factors_of(p, rest[ends[-1] :])
        grad, gate, up = grad.to(p.products).contiguous(), gate.to(p.products), up.to(p.products)
        grad_inner = p.down.matmul_t(grad)
        through, grads_b = p.out_of.backward(grad_inner, [grad], for_down, of_down)
        del grad
        grad_gate, grad_up, grads_a = _gated_backward(p, gate, up, grad_inner, through, of_down)
        down = alternated(grads_a, grads_b)
        del gate, up, grad_inner
        wide = recomputed(x).to(p.products) if x else grad_gate  # which only the gradients of pairs need
        grad_x = sum_of_matmul_t((p.gate, p.up), (grad_gate, grad_up)) if ctx.needs_input_grad[0] else None
        through, grads_b = p.into.backward(grad_x, [grad_gate, grad_up], shrunk, of_into)
        del grad_gate, grad_up
        into = alternated(p.into.of_a(through, wide, of_into), grads_b)
        return None if grad_x is None else grad_x.to(dtype), None, None, *into, *down


def _factors_of(p: Projections, factors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The factors of the pairs of gate and up, and of down."""
    return factors[: 2 * len(p.into.places)], factors[2 * len(p.into.places) :]


def _gated_backward(
    p: Projections, gate: Tensor, up: Tensor, grad: Tensor, through: Sequence[Tensor], factors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """∂g and ∂u of h = φ(g) ∘ u from its gradient, and ∂A of down's pairs, whose input is h. Overwrites its arguments."""
    if (by := p.activation.kernel(1, gate, up, grad)) is not None:
        inner = by(gate, up, grad)
        torch.autograd.graph.increment_version([gate, up, grad])  # so that a second backward pass through them raises
        return gate, up, p.out_of.of_a(through, grad if inner is None else inner, factors)
    active = p.activation.forward(gate)
    if p.out_of.on_gpu is not None:
        of_a = p.out_of.of_a(through, active * up, factors)
    else:
        parts = zip(p.out_of.parts, through, strict=True)
        of_a = p.out_of.split([_times_product(u.t(), active[rows], up[rows]) for (rows, _), u in parts], factors)
    grad_gate = p.activation.backward(up.mul_(grad), gate)
    return grad_gate, active.mul_(grad), of_a


def _times_product(left: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """left (rank, tokens) · (one ∘ other) (tokens, width) to (rank, width), without forming one ∘ other."""
    parts = zip(torch.split(one, COLUMNS, dim=1), torch.split(other, COLUMNS, dim=1), strict=True)
    return torch.cat([torch.mm(left, a * b) for a, b in parts], dim=1)


class GatedMlp(Replacement):
    """Replaces an MLP of transformers with gate_proj, up_proj, down_proj.

    It is fused if all three layers have plain pairs of the same adapters, and in training also without any; the original code
    computes anything else.
    """

    only: Tensor | None = None  # (n,): the tokens whose results are read; the others get zeros

    def __init__(self, original: nn.Module, activation: str) -> None:
        super().__init__(original)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.only is None:
            return self._of(x)
        return scattered(self._of(x.flatten(0, -2).index_select(0, self.only)), self.only, x.shape)

    def _of(self, x: Tensor) -> Tensor:
        """The MLP of every token of x (…, hidden)."""
        flat = x.reshape(-1, x.shape[-1])
        layers = [getattr(self.original, name) for name in MLP]
        divided = any(isinstance(layer, LoraLinear) and layer.selection.shares is not None for layer in layers)
        if divided and not (torch.is_grad_enabled() or self.training):  # the layers themselves stack short shares
            return cast(Tensor, self.original(x))
        uses = shared_uses(layers, len(flat))
        bases = [cast(LoraLinear, layer).base for layer in layers] if uses else _frozen_bases(layers, flat)
        if not bases:
            return cast(Tensor, self.original(x))
        gate, up, down = bases
        products = cast("torch.dtype | None", getattr(layers[0], "products", None)) or x.dtype
        into = [(share, pair, layer) for share, *pairs in uses for layer, pair in enumerate(pairs[:2])]
        out_of = [(share, pair, 0) for share, *_, pair in uses]
        out = pair_products(out_of, products, in_c=self.activation.in_c)  # C would need all of φ(g) ∘ u
        projections = Projections(gate, up, down, self.activation, products, pair_products(into, products), out)
        factors = [factor for _, pair, _ in (*into, *out_of) for factor in pair.factors()]
        y = cast(Tensor, GatedMlpFunction.apply(flat, projections, NormInputs.of(x), *factors))  # type: ignore[no-untyped-call]
        return y.view(x.shape)


def pair_products(uses: Sequence[tuple[Share, LoraPair, int]], products: torch.dtype, *, in_c: bool = True) -> PairProducts:
    """The products of pairs, each on the tokens of its share, that add to the layers with these indices."""
    places = [PairSpan(share.start, share.stop, share.weight * pair.scale, layer) for share, pair, layer in uses]
    return PairProducts(places, products, in_c=in_c)


def scattered(found: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """(n, hidden) at the tokens `places` (n,), without repeats, of a tensor of `shape` (…, hidden), and zeros elsewhere."""
    return found.new_zeros(shape).flatten(0, -2).index_copy(0, places, found).view(shape)


def _frozen_bases(layers: Sequence[nn.Module], x: Tensor) -> list[FrozenBase]:
    """The weights of layers that only pass gradients through, each dense or packed; empty if fusing saves nothing.

    The layers' own code saves the activation's result beside its input. It also rounds that, which the C gate does not, and
    multiplies by oneDNN: where C computes there is one way, with and without gradients, since a streamed block goes both.
    """
    if not (operators.supports(x) or (torch.is_grad_enabled() and x.requires_grad)):
        return []
    if any(getattr(layer, "bias", None) is not None for layer in layers):
        return []
    if any(getattr(layer, "products", None) not in (None, x.dtype) for layer in layers):
        return []  # their own code rounds between two products, also in a streamed forward pass
    if all(type(layer) is nn.Linear and not layer.weight.requires_grad and layer.weight.dtype == x.dtype for layer in layers):
        return [dense_base_of(layer, "linear") for layer in layers]
    packed = [None if isinstance(layer, LoraLinear) else getattr(layer, "base", None) for layer in layers]
    return [] if None in packed else cast("list[FrozenBase]", packed)


def shared_uses(layers: Sequence[nn.Module], tokens: int, *, biased: int = 0) -> list[tuple[Any, ...]]:
    """Each share of a batch with its pair on each layer; empty unless all layers have plain pairs for the same shares."""
    uses = [_plain_uses(layer, tokens, biased=number < biased) for number, layer in enumerate(layers)]
    if not all(uses):
        return []
    shares = [[share for share, _ in use] for use in uses]
    if any(own != shares[0] for own in shares):
        return []
    return [(together[0][0], *(pair for _, pair in together)) for together in zip(*uses, strict=True)]


def _plain_uses(layer: nn.Module, tokens: int, *, biased: bool) -> list[tuple[Share, LoraPair]]:
    """Which tokens use which pair of a layer; empty if a pair is special, or the layer has a bias."""
    if not isinstance(layer, LoraLinear) or (layer.bias is not None and not biased):
        return []
    uses = layer.uses(tokens)
    return uses if all(pair.plain for _, pair in uses) else []


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """y and ρ (…, 1) of RmsNormFunction, for x (…, width)."""
    if (by := elementwise_ops(x, weight, by_rows=True)) is not None:
        return by.norm(x, weight, epsilon)
    wide = x.float()
    rho = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(epsilon))
    return weight * wide.mul_(rho).to(x.dtype) if wide is not x else weight * (wide * rho), rho


def rms_norm_backward(grad: Tensor, x: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """∂x of RmsNormFunction, in the dtype of x."""
    if (by := elementwise_ops(x, weight, grad, by_rows=True)) is not None:
        return by.norm_backward(grad, x, rho, weight)
    scaled = grad.float() * weight.float()
    normal = x.float() * rho
    share = (scaled * normal).mean(-1, keepdim=True)
    return scaled.addcmul_(normal, share, value=-1).mul_(rho).to(x.dtype)


class RmsNormFunction(torch.autograd.Function):
    """(y, ρ): y = w ∘ x̂, x̂ = x·ρ, ρ = 1/√(mean(x²) + ε), in fp32;  ∂x = ρ·(w∘∂y − x̂·mean(w∘∂y∘x̂)). Saves x and ρ; w is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        y, rho = rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, rho, weight)
        ctx.mark_non_differentiable(rho)
        ctx.set_materialize_grads(False)  # else zeros are made for the gradient of ρ
        return y, rho

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        x, rho, weight = ctx.saved_tensors
        wanted = grad is not None and ctx.needs_input_grad[0]
        return rms_norm_backward(cast(Tensor, grad), x, rho, weight) if wanted else None, None, None


class FrozenRmsNorm(Replacement):
    """Replaces a frozen RMSNorm with `weight` and `variance_epsilon`."""

    @property
    def weight(self) -> Tensor:
        """The frozen gain."""
        return cast(Tensor, self.original.weight)

    def forward(self, x: Tensor) -> Tensor:
        epsilon = cast(float, self.original.variance_epsilon)
        y, rho = cast("tuple[Tensor, Tensor]", RmsNormFunction.apply(x, self.weight, epsilon))  # type: ignore[no-untyped-call]
        if torch.is_grad_enabled():
            setattr(y, _NOTE, NormInputs(x.detach(), rho, self.weight, y._version))
        return y
