"""The inner half of an attention layer as one autograd function: q, k and v with their pairs, rotary positions, packed attention.

Fusing saves casts, memory and hundreds of small operations a block, not formulas: the low-rank products are those of core/math
over any FrozenBase; kernels/choose chooses the attention kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakeet.core.base import DenseBase, FrozenBase, matmul_each, sum_of_matmul_t
from lorakeet.core.fused.mlp_and_norm import (
    FrozenRmsNorm,
    NormInputs,
    pair_products,
    recomputed,
    rms_norm,
    rms_norm_backward,
    saved_for,
    scattered,
)
from lorakeet.core.fused.packed_attention import kernel_of
from lorakeet.core.layers.linear import LoraLinear, Replacement
from lorakeet.core.pair_products import PairProducts, alternated
from lorakeet.kernels.choose import elementwise_ops, packed_rows
from lorakeet.kernels.cpu import operators
from lorakeet.kernels.protocol import PackedAttention

INPUTS = ("q_proj", "k_proj", "v_proj")
HEAD_NORMS = ("q_norm", "k_norm")  # which some models have
CACHES = ("row_cache", "cache", "past_key_values")  # settings with the keys of earlier tokens


@dataclass(frozen=True)
class HeadNorm:
    """The frozen RMSNorm over each head of queries, or of keys: its gain (d,) and ε."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class AttentionInputs:
    """The frozen weights of q, k and v, their biases, and the pairs, each on its tokens.

    `norms` are the norms of the heads of q and k; empty if the model has none.
    """

    bases: Sequence[FrozenBase]
    biases: Sequence[Tensor | None]
    pairs: PairProducts
    norms: Sequence[HeadNorm]
    head: int  # numbers of one head
    kernel: PackedAttention


class RotaryAttentionFunction(torch.autograd.Function):
    """O = attention(R·Q(x), R·K(x), V(x)) with P(x) = x·Wᵀ + b + s·x·Aᵀ·Bᵀ, and R the rotation of each head by its position.

    R turns the two halves (a, b) of a head to (a·c₁ − b·s₁, b·c₂ + a·s₂). With ∂O given, the kernel gives the gradients of the
    turned states; Rᵀ turns them back, (a·c₁ + b·s₂, b·c₂ − a·s₁), and then, with u = s·∂·B for each of the three,

        ∂B = s·∂ᵀ·(x·Aᵀ)      ∂A = uᵀ·x      ∂x = Σ (∂·W + u·A)

    Within a part of the tokens one product with all A's shrinks x, one with all u's gives all ∂A. Saved: x (or what it was
    normed from), the three states, the rank-sized products. Where the heads of Q and K are normed before they are turned, these
    two are saved as they were before, with ρ of each head (core/fused/mlp_and_norm.rms_norm), and normed and turned again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, inputs: AttentionInputs, made_of: NormInputs | None, *factors: Tensor
    ) -> Tensor:
        products = inputs.pairs.products
        wide = x.to(products)
        outs = matmul_each(inputs.bases, wide)
        for out, bias in zip(outs, inputs.biases, strict=True):
            if bias is not None:
                out.add_(bias)
        shrunk = inputs.pairs.add(outs, wide, factors)
        turn = cos.to(products), sin.to(products)
        query, key, value = (out.view(len(x), -1, inputs.head) for out in outs)
        before = [states.to(x.dtype) for states, _ in zip((query, key), inputs.norms, strict=False)]
        by_norm = [rms_norm(each, norm.weight, norm.epsilon) for each, norm in zip(before, inputs.norms, strict=True)]
        if by_norm:
            query, key = (states.to(products) for states, _ in by_norm)
        states = [_laid(each, x.dtype) for each in (rotated(query, *turn), rotated(key, *turn), value)]
        result, kept = inputs.kernel.forward(*states)
        source, held = saved_for(x, made_of), states
        if by_norm:
            held = [part for each, (_, rho) in zip(before, by_norm, strict=True) for part in (each, rho)] + states[2:]
        ctx.save_for_backward(cos, sin, *source, *held, *kept, *shrunk, *factors)
        ctx.inputs, ctx.counts = inputs, (len(source), len(held), len(kept), len(shrunk))
        return result.reshape(len(x), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs: AttentionInputs = ctx.inputs
        products = inputs.pairs.products
        cos, sin, *rest = ctx.saved_tensors
        ends = list(accumulate(ctx.counts, initial=0))
        source, states, kept, shrunk = (rest[start:stop] for start, stop in pairwise(ends))
        x, factors = recomputed(source), rest[ends[-1] :]
        turn = cos.to(products), sin.to(products)
        before = [(states[2 * number], states[2 * number + 1], norm.weight) for number, norm in enumerate(inputs.norms)]
        if before:
            again = [rotated(recomputed(each).to(products), *turn) for each in before]
            states = [*(_laid(each, x.dtype) for each in again), states[-1]]
        found = inputs.kernel.backward(grad.view(1, len(x), -1, inputs.head), *states, *kept)
        query, key, value = (states[0].transpose(0, 1).to(products) for states in found)  # (tokens, heads, head)
        back = [*(rotated(states, *turn, back=True) for states in (query, key)), value]
        for number, each in enumerate(before):
            back[number] = rms_norm_backward(back[number].to(x.dtype).contiguous(), *each).to(products)
        grads = [states.reshape(len(x), -1) for states in back]
        grad_x = sum_of_matmul_t(inputs.bases, grads) if ctx.needs_input_grad[0] else None
        through, of_b = inputs.pairs.backward(grad_x, grads, shrunk, factors)
        of_a = inputs.pairs.of_a(through, x.to(products), factors)
        return None if grad_x is None else grad_x.to(x.dtype), None, None, None, None, *alternated(of_a, of_b)


def rotated(states: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """R·states, or Rᵀ·states, of (tokens, heads, head); cos and sin are (tokens, head). May overwrite `states`."""
    if (by := elementwise_ops(states, cos, sin, width=2 * operators.LANES)) is not None:
        by.rotate_(states, cos, sin, back)
        return states
    half = states.shape[2] // 2
    a, b = states[..., :half], states[..., half:]
    c1, c2 = cos[:, None, :half], cos[:, None, half:]
    s1, s2 = sin[:, None, :half], sin[:, None, half:]
    if back:
        s1, s2 = -s2, -s1
    out = torch.empty_like(states, memory_format=torch.contiguous_format)
    torch.mul(a, c1, out=out[..., :half]).addcmul_(b, s1, value=-1)
    torch.mul(b, c2, out=out[..., half:]).addcmul_(a, s2)
    return out


def _laid(states: Tensor, dtype: torch.dtype) -> Tensor:
    """A view of (tokens, heads, head) as (1, heads, tokens, head)."""
    return states.to(dtype).transpose(0, 1)[None]


class RotaryAttention(Replacement):
    """Replaces an attention of transformers with q_proj, k_proj, v_proj, o_proj and rotary positions on whole heads, which the
    model may norm first.

    It is fused for packed rows on a CPU, or on a GPU with a varlen kernel, if q, k and v have plain pairs or none; the original
    code computes anything else.
    """

    only: Tensor | None = None  # (n,): the tokens whose results are read; the others get zeros

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        inputs, factors = self._inputs(hidden_states, position_embeddings, attention_mask, settings)
        if inputs is None or position_embeddings is None:
            return cast(
                "tuple[Tensor, None]",
                self.original(hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **settings),
            )
        cos, sin = (part[0] for part in position_embeddings)
        given = hidden_states.flatten(0, 1), cos, sin, inputs, NormInputs.of(hidden_states)  # of one row: no gradient is copied
        states = cast(Tensor, RotaryAttentionFunction.apply(*given, *factors))  # type: ignore[no-untyped-call]
        outward = cast(nn.Module, self.original.o_proj)
        if self.only is None:
            return outward(states[None]), None
        return scattered(outward(states.index_select(0, self.only)), self.only, hidden_states.shape), None

    def _inputs(
        self, x: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor | None, settings: dict[str, Any]
    ) -> tuple[AttentionInputs | None, list[Tensor]]:
        """The arguments of the fused function, and A and B of each pair; None if it cannot be used."""
        nothing: tuple[None, list[Tensor]] = None, []
        rows, cached = settings.get("row_lengths"), any(settings.get(name) is not None for name in CACHES)
        if rows is None or cached or mask is not None or turn is None or len(x) != 1:
            return nothing
        head, prefix = cast(int, self.original.head_dim), cast(int, settings.get("row_prefix", 0))
        if turn[0].shape != (1, x.shape[1], head) or self.exceeds_window(prefix + max(rows)) or self.has_dropout:
            return nothing
        layers, norms = [getattr(self.original, name) for name in INPUTS], self.head_norms()
        if norms is None or not all(_known(layer) for layer in layers):
            return nothing
        adapted = [(number, layer) for number, layer in enumerate(layers) if isinstance(layer, LoraLinear)]
        uses = [(share, pair, number) for number, layer in adapted for share, pair in layer.uses(x.shape[1])]
        if not uses or not all(pair.plain for _, pair, _ in uses):
            return nothing
        uses.sort(key=lambda use: (use[0].start, use[0].stop))  # q, k and v of the same tokens become neighbours: one part
        bases = [layer.base if isinstance(layer, LoraLinear) else DenseBase(layer) for layer in layers]
        heads, kv = (base.shape[0] // head for base in bases[:2])
        own = kernel_of(packed_rows(x, settings.get("row_products") or torch.float32, heads, kv, head, rows, prefix))
        if own is None:
            return nothing
        products = next(layer.products for layer in layers if isinstance(layer, LoraLinear)) or x.dtype
        scale = cast(float, self.original.scaling)
        pairs, kernel = pair_products(uses, products), own(rows, scale, prefix)
        inputs = AttentionInputs(bases, [layer.bias for layer in layers], pairs, norms, head, kernel)
        return inputs, [factor for _, pair, _ in uses for factor in pair.factors()]

    def head_norms(self) -> list[HeadNorm] | None:
        """The norms of q's and k's heads; empty if the model has none, None if they are not FrozenRmsNorms."""
        modules = [self.original._modules[name] for name in HEAD_NORMS if name in self.original._modules]
        head = cast(int, self.original.head_dim) if modules else 0
        found = [norm for norm in (_head_norm(module, head) for module in modules) if norm is not None]
        return found if len(found) == len(modules) in (0, len(HEAD_NORMS)) else None

    def windows(self) -> list[int]:
        """The attention windows of the layer or its model, if any."""
        original = self.original
        limits = [getattr(holder, "sliding_window", None) for holder in (original, getattr(original, "config", None))]
        return [limit for limit in limits if isinstance(limit, int)]

    def exceeds_window(self, tokens: int) -> bool:
        """True if a query cannot see so many tokens."""
        return any(tokens > limit for limit in self.windows())

    @property
    def has_dropout(self) -> bool:
        """True if attention dropout is active."""
        return bool(self.training and getattr(self.original, "attention_dropout", 0.0))


def _head_norm(module: nn.Module | None, head: int) -> HeadNorm | None:
    """The norm of heads of so many numbers, if a FrozenRmsNorm without hooks replaces it."""
    if type(module) is not FrozenRmsNorm or any(each._forward_hooks or each._forward_pre_hooks for each in module.modules()):
        return None
    plain = not module.weight.requires_grad and module.weight.shape == (head,)
    return HeadNorm(module.weight, cast(float, module.original.variance_epsilon)) if plain else None


def _known(layer: nn.Module) -> bool:
    """True if the fused function supports the layer: one that takes pairs, or nn.Linear. Divided batches of inference use the
    layers' own code, which stacks short shares (core/layers/linear).
    """
    if isinstance(layer, LoraLinear):
        return layer.selection.shares is None or torch.is_grad_enabled() or layer.training
    return type(layer) is nn.Linear and not layer.weight.requires_grad
