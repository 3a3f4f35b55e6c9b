"""A whole decoder block with pairs as one autograd function, computed in one call of C.

    x ──┬── norm ── q, k, v ── rotation ── attention ── o ──+──┬── norm ── gated MLP ──+── y
        └───────────────────────────────────────────────────┘  └───────────────────────┘

A step of a small model has so many operations that a sixth of its time passes between them. The numbers equal those of the fused
parts (core/fused/mlp_and_norm, core/fused/attention) to the last bit; the parts compute what no such kernel supports
(kernels/choose.trained_block).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakeet.core.base import stored_weight
from lorakeet.core.fused.attention import CACHES, INPUTS, RotaryAttention
from lorakeet.core.fused.mlp_and_norm import MLP, FrozenRmsNorm, GatedMlp, shared_uses
from lorakeet.core.layers.linear import BLOCK_PARTS, BlockReplacement, LoraLinear
from lorakeet.core.selection import Share
from lorakeet.kernels.choose import trained_block
from lorakeet.kernels.cpu import attention as row_attention
from lorakeet.kernels.cpu import operators, trained_pairs
from lorakeet.kernels.cpu.stored import StoredWeight
from lorakeet.kernels.cpu.workspace import WORKSPACES
from lorakeet.kernels.protocol import TrainedBlocks

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class TrainedBlockFunction(torch.autograd.Function):
    """y of a block of x (1, tokens, hidden); the backward pass gives ∂x and, for each pair, ∂A and ∂B, by the formulas of the
    parts.

    It saves what the parts save, in one tensor, beside x. `factors` are A and B as in kernels/cpu/trained_block.BlockCall, which
    keeps them: saving fourteen tensors takes torch a twentieth of a millisecond, and reading them as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, call: Any, *factors: Tensor) -> Tensor:
        y: Tensor
        y, kept = call.forward(x[0], cos, sin)
        ctx.save_for_backward(x, cos, sin, kept)
        ctx.call, ctx.versions = call, [factor._version for factor in factors]
        return y[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, kept = ctx.saved_tensors
        factors = ctx.call.factors
        if [factor._version for factor in factors] != ctx.versions:
            raise RuntimeError("A or B of a pair was written to between the two passes of a block, whose gradients want both.")
        grad = grad[0].to(x.dtype).contiguous()
        grad_x, found = ctx.call.backward(x[0], cos, sin, kept, grad, wants_x=ctx.needs_input_grad[0])
        torch.autograd.graph.increment_version(kept)  # so that a second backward pass through it raises
        of_factors = [
            each if factor.dtype == each.dtype else each.to(factor.dtype) for each, factor in zip(found, factors, strict=True)
        ]
        return None if grad_x is None else grad_x[None], None, None, None, *of_factors


class TrainedBlock(BlockReplacement):
    """Replaces a decoder block of two norms, attention and gated MLP whose parts are fused already.

    It is used for packed rows in bf16, if all seven layers have plain pairs for the same tokens, with and without gradients, over
    weights that C reads, dense or packed (kernels/cpu/stored). The original code and its parts compute anything else, and blocks
    with hooks on a part.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **settings: Any) -> Any:
        prepared = None
        if not args and (kernel := self._kernel_for(hidden_states, settings)) is not None:
            prepared = self._prepared(kernel, hidden_states, settings["row_lengths"], settings.get("row_prefix", 0))
        if prepared is None:
            if not torch.is_grad_enabled() and not WORKSPACES.taken:
                WORKSPACES.release()  # this pass needs none, and has memory of its own
            return self.original(hidden_states, *args, **settings)
        call, factors = prepared
        cos, sin = (part[0].to(hidden_states.dtype).contiguous() for part in settings["position_embeddings"])
        if not torch.is_grad_enabled():
            return call.forward(hidden_states[0], cos, sin, alone=True)[0][None]
        return TrainedBlockFunction.apply(hidden_states, cos, sin, call, *factors)  # type: ignore[no-untyped-call]

    def _kernel_for(self, x: Tensor, settings: dict[str, Any]) -> TrainedBlocks | None:
        """The kernel that computes packed rows in one call, if there is one for these."""
        rows, rotary = settings.get("row_lengths"), settings.get("position_embeddings")
        if rows is None or rotary is None or any(settings.get(name) is not None for name in ("attention_mask", *CACHES)):
            return None
        head = cast(Any, self.original)._modules["self_attn"].original.head_dim
        if x.dim() != 3 or len(x) != 1 or any(part.shape != (1, x.shape[1], head) for part in rotary):
            return None
        if torch._C._len_torch_dispatch_stack():  # as when operations are counted
            return None
        return trained_block(x, settings.get("row_products") or torch.float32, head, rows, settings.get("row_prefix", 0))

    def _prepared(self, kernel: TrainedBlocks, x: Tensor, rows: Sequence[int], prefix: int) -> tuple[Any, list[Tensor]] | None:
        """Prepares the call, and A and B of all pairs; None if the block's parts must compute."""
        parts, tokens = self._parts(prefix + max(rows)), x.shape[1]
        if parts is None:
            return None
        first, attention, second, mlp = parts
        own: Any = attention.original
        owners, inner = own._modules, mlp.original._modules  # plain dicts: 30 blocks need this in every pass
        layers = [*(owners[name] for name in (*INPUTS, "o_proj")), *(cast(nn.Module, inner[name]) for name in MLP)]
        weights = _weights_of(kernel, (first, second), attention, layers, x)
        uses = [] if weights is None else shared_uses(layers, tokens, biased=len(INPUTS))
        pairs = [pair for _, *of_layers in uses for pair in of_layers]
        if weights is None or not uses or any(pair._forward_hooks for pair in pairs):
            return None
        factors = [factor for pair in pairs for factor in pair.factors()]
        spans = _spans([share for share, *_ in uses])
        shapes = tuple([weight[1:3] for weight in weights.layers])
        taken = all(trained_pairs.is_factor(factor) and factor.is_cpu for factor in factors)
        if not taken or not _fit(shapes, x.shape[2], own.head_dim) or not _apart(spans):
            return None
        changed = [(len(B), A.shape[1]) for A, B in zip(factors[::2], factors[1::2], strict=True)]
        if changed != [*shapes] * len(spans):
            return None
        scales = [share.weight * pair.scale for share, *of_layers in uses for pair in of_layers]
        heads, kv = (weight.out // own.head_dim for weight in weights.layers[:2])
        shape = _shape_of(tuple(rows), prefix, own.scaling, (tokens, heads, kv, own.head_dim))
        owners = [*weights.owners(), *(factor.detach() for factor in factors)]
        pairs_given = kernel.Pairs(factors, spans, scales, tokens)
        return kernel.BlockCall(weights.as_struct(), shape, pairs_given, factors, owners), factors

    def _parts(self, keys: int) -> tuple[FrozenRmsNorm, RotaryAttention, FrozenRmsNorm, GatedMlp] | None:
        """The block's parts, if all are fused, compute every token, see so many keys, and have no hooks."""
        block = self.original
        owners = [block._modules[name] for name in BLOCK_PARTS]
        first, attention, second, mlp = owners
        if type(first) is not FrozenRmsNorm or type(second) is not FrozenRmsNorm:
            return None
        if type(attention) is not RotaryAttention or type(mlp) is not GatedMlp or not mlp.activation.in_c:
            return None
        if attention.only is not None or mlp.only is not None or attention.has_dropout or attention.exceeds_window(keys):
            return None
        heard = (block, *owners, attention.original.o_proj)
        again = getattr(block, "gradient_checkpointing", False)
        if again or any(getattr(module, hooks) for module in heard for hooks in HOOKS):
            return None
        return first, attention, second, mlp


def _readable(*states: Tensor) -> bool:
    """True if C can read the states' numbers, not only their shapes."""
    return all(type(each) in operators.READ for each in states) and operators.supports(*states)


def _weights_of(
    kernel: TrainedBlocks,
    norms: tuple[FrozenRmsNorm, FrozenRmsNorm],
    attention: RotaryAttention,
    layers: Sequence[nn.Module],
    x: Tensor,
) -> Any:
    """The frozen weights of a block; None if C cannot read them all."""
    plain = [layer for layer in layers if type(layer) is LoraLinear and layer.products in (None, torch.bfloat16)]
    stored_of = [found for layer in plain if (found := stored_weight(layer.base, x)) is not None]
    heads = attention.head_norms()
    if heads is None or len(stored_of) < len(layers):
        return None
    biases = [cast(LoraLinear, layer).bias for layer in layers[: len(INPUTS)]]
    by_norm = [(norm.weight, cast(float, norm.original.variance_epsilon)) for norm in norms]
    by_head = [(norm.weight, norm.epsilon) for norm in heads]
    if not _readable(*(gain for gain, _ in (*by_norm, *by_head))):
        return None
    head = cast(Any, attention.original).head_dim
    fit = all(bias is None or _is_bias(bias, weight) for bias, weight in zip(biases, stored_of, strict=False))
    if not fit or any(len(gain) != head for gain, _ in by_head) or any(len(gain) != x.shape[2] for gain, _ in by_norm):
        return None
    kept = [None if bias is None else bias.detach() for bias in biases]
    return kernel.Weights(stored_of, kept, *([(gain.detach(), epsilon) for gain, epsilon in of] for of in (by_head, by_norm)))


def _is_bias(bias: Tensor, weight: StoredWeight) -> bool:
    """True if C can add the bias; autograd needs one that is trained."""
    return not bias.requires_grad and bias.shape == (weight.out,) and _readable(bias)


@lru_cache(maxsize=8)
def _fit(shapes: tuple[tuple[int, ...], ...], hidden: int, head: int) -> bool:
    """True if weights of these shapes form a block, in widths that C computes."""
    if any(len(shape) != 2 or any(size <= 0 or size % trained_pairs.WIDTH for size in shape) for shape in shapes):
        return False
    queries, keys, inner = (shapes[number][0] for number in (0, 1, 4))
    inward = (queries, hidden), (keys, hidden), (keys, hidden)
    wanted = *inward, (hidden, queries), (inner, hidden), (inner, hidden), (hidden, inner)
    return shapes == wanted and queries % head == 0 and keys % head == 0 and queries % keys == 0


def _spans(shares: Sequence[Share]) -> tuple[tuple[int, int], ...]:
    return tuple([(share.start, share.stop) for share in shares])


@lru_cache(maxsize=8)
def _apart(spans: tuple[tuple[int, int], ...]) -> bool:
    """True if every share has tokens, and no two overlap; the parts compute mixes of adapters on the same tokens."""
    places = [number for start, stop in spans for number in (start, stop, 0)]
    return len(set(spans)) == len(spans) and trained_pairs.parts_are_disjoint(places)


_shape_of = lru_cache(maxsize=8)(row_attention.attention_shape)  # shared by all blocks of a pass
