"""A whole decoder block for generation, in fewer operations than a model's own code.

    x ──┬── norm ── q, k, v ── rotation ── attention over the cache ── o ──+──┬── norm ── gated MLP ──+── y
        └──────────────────────────────────────────────────────────────────┘  └───────────────────────┘

When tokens are generated, a step is a few tokens wide: calling an operation takes longer than computing it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lorakeet.core.batched.mix_copies import MixRows
from lorakeet.core.fused.attention import INPUTS, rotated
from lorakeet.core.fused.packed_attention import AttentionRule
from lorakeet.core.layers.linear import BLOCK_PARTS, BlockReplacement, LoraLinear, PairCopies, SharedInput
from lorakeet.core.reordered import Order, ReorderedBase
from lorakeet.core.selection import BatchAssignment
from lorakeet.kernels.choose import decode_block
from lorakeet.kernels.cpu.block import NewTokens
from lorakeet.kernels.protocol import DecodeBlocks


class DecodeCache(Protocol):
    """The keys and values of earlier tokens, as models/generate/kv_cache stores them."""

    capacity: int

    new_tokens: NewTokens

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (slots, kv heads, capacity, d) of a layer; `key` and `value` (·, kv heads, d) show dtype and shape."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        """q (tokens, heads, d), k and v (tokens, kv heads, d) of the new tokens to (tokens, heads, d)."""


class DecodeBlock(BlockReplacement):
    """Replaces a decoder block of two norms, attention and gated MLP whose parts are fused already.

    It is used without gradients, with earlier tokens in a cache; the original code computes anything else. The parts within are
    not called one by one, so that hooks on them do not run.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        first, attention, second, mlp = (getattr(original, name) for name in BLOCK_PARTS)
        own: Any = attention.original
        self._parts: tuple[Any, Any, Any] = (own, mlp.original.down_proj, mlp.activation.forward)  # a tuple: no submodules twice
        gated = mlp.original
        groups = [getattr(own, name) for name in INPUTS], [own.o_proj], [gated.gate_proj, gated.up_proj], [gated.down_proj]
        self._groups = tuple(map(_SameInput, groups))
        self._inward, _, self._apart, _ = self._groups
        self._layers = tuple(layer for group in groups for layer in group)
        self._limit = min(attention.windows(), default=None)
        self._normed = [(cast(Tensor, norm.weight), cast(float, norm.original.variance_epsilon)) for norm in (first, second)]
        self._norms = tuple(_norm_of(*given) for given in self._normed)
        self._silu = bool(mlp.activation.in_c)
        self._kernel = ""  # the name of that of `_block`
        self._orders: list[Order] = []
        self._block: Any = None
        self._lookup = _Lookup()

    def forward(self, hidden_states: Tensor, *args: Any, **settings: Any) -> Any:
        cache, turn = settings.get("row_cache"), settings.get("position_embeddings")
        if cache is None or args or turn is None or torch.is_grad_enabled() or not self._suits(cache, hidden_states, turn):
            return self.original(hidden_states, *args, **settings)
        x = hidden_states[0]
        kernel = decode_block(x)
        block = None if kernel is None else self._block_of(kernel, x)
        if kernel is not None and block is not None and (pairs := self._pairs(kernel, x)) is not None:
            like = x.new_empty(0, *block.cached)
            held = cache.layer(self._parts[0].layer_idx, like, like)
            return block.forward(x.contiguous(), pairs, cache.new_tokens, turn, held)[None]
        first, second = self._norms
        x = x + self._attention(first(x), cache, turn[0][0], turn[1][0])
        gate, up = self._apart(second(x))
        _, down, activation = self._parts
        return x.add_(down(activation(gate).mul_(up)))[None]

    def _block_of(self, kernel: DecodeBlocks, x: Tensor) -> Any:
        """The block for the kernel (kernels/protocol.DecodeBlocks.Block); None if it cannot compute it."""
        layers = self._layers
        if not all(isinstance(layer, LoraLinear) and layer.products in (None, x.dtype) for layer in layers):
            return None
        orders = [layer.base.order for layer in layers if isinstance(layer.base, ReorderedBase)]
        moved = self._block is not None and self._block.moved
        if moved or self._kernel != kernel.__name__ or self._orders != orders:  # changes when a base is given another weight
            self._kernel, self._orders, self._block = kernel.__name__, orders, self._laid_out(kernel, orders)
        return self._block

    def _pairs(self, kernel: DecodeBlocks, x: Tensor) -> Any:
        """The pairs of x (tokens, hidden) for the kernel; None if some are special, or in a layout that it does not read."""
        selection = self._layers[0].selection
        if selection.shares is None:
            return kernel.NO_PAIRS if selection.active is None else None
        to, changes = selection.assignment(len(x), x.device), selection.changes
        last = self._lookup
        if last.to is not to or last.changes != changes or last.kernel is not kernel:
            last = self._lookup = _Lookup(self._prepared_pairs(kernel, x), to, changes, kernel)
        return last.pairs

    def _prepared_pairs(self, kernel: DecodeBlocks, x: Tensor) -> Any:
        numbers: list[int | None] = []
        shares = None
        for group in self._groups:
            to, stack = group.prepared(len(x), x.dtype, x.device)
            if stack.meets_special(to) or not (stack.empty or isinstance(stack, MixRows)):
                return None
            if isinstance(stack, MixRows) and not stack.empty:
                shares = stack.shares
                if not isinstance(shares, kernel.Shares):
                    return None
                numbers += stack.numbers
            else:
                numbers += [None] * len(group.layers)
        return kernel.BlockPairs.of(shares, numbers)

    def _laid_out(self, kernel: DecodeBlocks, orders: Sequence[Order]) -> Any:
        if len(orders) < len(self._layers) or not self._silu:
            return None
        norms, epsilons = zip(*self._normed, strict=True)
        biases = tuple(layer.bias for layer in self._layers)
        own = self._parts[0]
        parts = kernel.BlockParts(norms, epsilons, tuple(orders), biases, own.head_dim, own.scaling)
        return kernel.Block(parts) if parts.fit else None

    def _suits(self, cache: DecodeCache, x: Tensor, turn: tuple[Tensor, Tensor]) -> bool:
        head = self._parts[0].head_dim
        return len(x) == 1 and turn[0].shape == (1, x.shape[1], head) and (self._limit is None or cache.capacity <= self._limit)

    def _attention(self, x: Tensor, cache: DecodeCache, cos: Tensor, sin: Tensor) -> Tensor:
        """x (tokens, hidden), after the norm, to the output of attention."""
        own = self._parts[0]
        q, k, v = self._inward(x)
        both = rotated(torch.cat([q, k], dim=1).view(len(x), -1, own.head_dim), cos, sin)
        heads = q.shape[1] // own.head_dim
        values = v.view(len(x), -1, own.head_dim)
        found = cache.attend(own.layer_idx, both[:, :heads], both[:, heads:], values, AttentionRule(own.scaling))
        added: Tensor = own.o_proj(found.reshape(len(x), -1))
        return added


class _Lookup:
    """The pairs of an assignment for a kernel, after so many changes of adapters."""

    def __init__(
        self, pairs: Any = None, to: BatchAssignment | None = None, changes: int = -1, kernel: DecodeBlocks | None = None
    ) -> None:
        self.pairs, self.to, self.changes, self.kernel = pairs, to, changes, kernel

    def __deepcopy__(self, memo: dict[int, object]) -> _Lookup:
        """A new one: another block looks up its own."""
        return _Lookup()


class _SameInput:
    """Layers with the same input."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = tuple(layers)
        self._adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
        self._shared = SharedInput() if len(self._adapted) == len(layers) else None

    def prepared(self, tokens: int, products: torch.dtype, device: torch.device) -> tuple[BatchAssignment, PairCopies]:
        """SharedInput.prepared for layers that can all be adapted."""
        return cast(SharedInput, self._shared).prepared(self._adapted, tokens, products, device)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x (tokens, in) to (tokens, out) of each."""
        if self._shared is not None and self._adapted[0].selection.shares is not None:
            return self._shared(self._adapted, x)
        return [layer(x) for layer in self.layers]


def _norm_of(weight: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
    """x to w ∘ x/√(mean(x²) + ε), the mean in fp32, in few operations."""

    def normed(x: Tensor) -> Tensor:
        wide = x.float()
        length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rho = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        return (wide * rho).to(x.dtype).mul_(weight)

    return normed
