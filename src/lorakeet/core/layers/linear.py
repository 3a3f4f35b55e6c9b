"""The modules that replace the frozen ones in a model. Each holds the original, untouched, and its adapters by name.

`active` is the name of the adapter in use, or None for the bare base: then the original module runs, bit for bit. Where the
selection divides a batch, each share of its tokens has its own adapter (core/batched/stack). `models/inject` inserts and removes
these modules.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.base import DenseBase, FrozenBase, TransposedBase
from lorakeet.core.batched.mix_copies import MixRows
from lorakeet.core.batched.stack import PairStack, shared_low_rank
from lorakeet.core.dora import DoraPair
from lorakeet.core.initialise import initialise
from lorakeet.core.lowrank import LoraPair, frozen_linear, low_rank_by_torch
from lorakeet.core.plan import PlanEntry
from lorakeet.core.reordered import ReorderedBase, ReorderedProducts
from lorakeet.core.selection import BatchAssignment, Selection, Share
from lorakeet.core.spec import FACTORED
from lorakeet.kernels.choose import inference_pairs

FEW_TOKENS = 128  # for which torch's own gradients are faster than LowRankLinear's (docs/log/training-speed)
BLOCK_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")  # of a decoder block


class Replacement(nn.Module):
    """A module that replaces `original` in a model, and holds it untouched."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def weights_loaded(self) -> AbstractContextManager[object]:
        """A context in which the frozen weights within are loaded; they always are, unless they are streamed."""
        return nullcontext()


class BlockReplacement(Replacement):
    """Replaces a whole decoder block, and forwards its attributes, such as the type of its attention."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class AdaptedLayer(Replacement):
    """A frozen module with any number of named adapters, one of which may be active."""

    products: torch.dtype | None = None  # dtype of the matrix products (core/precision); None: that of the input

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.adapters = nn.ModuleDict()
        self.selection = Selection()  # models/inject gives all layers of a model the same one

    @property
    def active(self) -> str | None:
        """The adapter that every token uses, if this layer has it; None for the bare base and in divided batches."""
        selection = self.selection
        if selection.shares is not None or selection.active is None or selection.active not in self.adapters:
            return None
        return selection.active

    @active.setter
    def active(self, name: str | None) -> None:
        self.selection.use(name)

    @property
    def in_use(self) -> bool:
        """True if any adapter of this layer is active."""
        shares = self.selection.shares
        return self.active is not None if shares is None else any(share.name in self.adapters for share in shares)

    def attach(self, name: str, adapter: nn.Module) -> None:
        """Adds `adapter` under `name`; `activate` uses it."""
        self.adapters[name] = adapter
        self.selection.changed(name)

    def detach(self, name: str) -> None:
        """Removes the adapter `name`; if it was active, the bare base is in use again."""
        del self.adapters[name]
        self.selection.changed(name)

    @property
    def _adapters(self) -> dict[str, nn.Module | None]:
        """The adapters as a plain dict, which is faster than nn.Module's lookup: every layer needs it in every pass."""
        return cast(nn.Module, self._modules["adapters"])._modules

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for model code that reads its dtype or device."""
        return cast(Tensor, self.original.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self._modules["original"], "bias", None))

    def pair(self) -> LoraPair | None:
        """The active pair, or None if the active adapter has none on this layer."""
        active = self.active
        return None if active is None else cast(LoraPair, self.adapters[active])

    def uses(self, tokens: int) -> list[tuple[Share, LoraPair]]:
        """Which of `tokens` tokens use which pair here, in a divided batch or in one with a single adapter."""
        held = self._adapters
        return [(share, cast(LoraPair, held[share.name])) for share in self.selection.all_shares(tokens) if share.name in held]

    def require_undivided(self, what: str) -> None:
        """Raises ValueError if a share of a divided batch uses an adapter of this layer, which only supports whole batches."""
        if self.selection.shares is not None and self.in_use:
            raise ValueError(f"{what} cannot differ within a batch; switch between adapters instead")


class LoraLinear(AdaptedLayer):
    """nn.Linear, GPT-2's Conv1D or a quantised linear layer, seen through a FrozenBase."""

    by_torch = False  # whether few tokens may use torch's own gradients, on a dense weight of their dtype (api/attach)

    def __init__(self, original: nn.Module, base: FrozenBase) -> None:
        super().__init__(original)
        self.base = base
        self._alone = SharedInput()

    @property
    def in_features(self) -> int:
        return self.base.shape[1]

    @property
    def out_features(self) -> int:
        return self.base.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.selection.shares is not None and self.adapters._modules:
            flat = x.reshape(-1, x.shape[-1])
            return self._divided(flat).view(*x.shape[:-1], self.out_features)
        pair = self.pair()
        if pair is None:
            return self.bare(x)
        if self.by_torch and self._alike(x, pair):
            dropout = pair.dropout if pair.training else 0.0
            return low_rank_by_torch(x, self.weight, (*pair.factors(), pair.scale), bias=self.bias, dropout=dropout)
        return cast(Tensor, pair(x, self.base, self.bias, self.products))

    def _alike(self, x: Tensor, pair: LoraPair) -> bool:
        """Whether x has few tokens, and x, the frozen weight, A and B are dense, of one dtype and on the CPU."""
        if x.numel() > FEW_TOKENS * x.shape[-1]:
            return False
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return False  # frozen for LowRankLinear, whatever the number of tokens
        dtypes = {x.dtype, self.weight.dtype, pair.A.dtype, pair.B.dtype, self.products or x.dtype}
        dense = type(self.base) is DenseBase and type(pair) is LoraPair and pair.bias is None
        return dense and len(dtypes) == 1 and x.is_cpu and not torch.is_autocast_enabled("cpu")

    def bare(self, x: Tensor) -> Tensor:
        """x (…, in) through the frozen weight alone."""
        if self.products is None or self.products == x.dtype:
            return cast(Tensor, self.original(x))
        return frozen_linear(x, self.base, bias=self.bias, products=self.products)

    def _divided(self, x: Tensor) -> Tensor:
        """x (tokens, in) to (tokens, out), each share of the tokens with its pair."""
        if torch.is_grad_enabled() or self.training:
            shares = self.uses(len(x))
            if not shares:
                return self.bare(x)
            if not all(pair.plain for _, pair in shares):
                return self._one_by_one(x, shares)
            return shared_low_rank(x, self.base, shares, bias=self.bias, products=self.products)
        return self._alone([self], x)[0]

    def _one_by_one(self, x: Tensor, shares: Sequence[tuple[Share, LoraPair]]) -> Tensor:
        """Computes shares with special pairs (DoRA, biases) one by one, and the tokens between them, mixed or not, together."""
        parts, done = [], 0
        for special, pair in sorted(require_no_mix(shares), key=lambda one: one[0].start):
            if done < special.start:
                parts.append(self._plain(x, shares, done, special.start))
            parts.append(self.by_itself(x, special, pair))
            done = special.stop
        if done < len(x):
            parts.append(self._plain(x, shares, done, len(x)))
        return torch.cat(parts)

    def by_itself(self, x: Tensor, share: Share, pair: LoraPair) -> Tensor:
        """Computes one share of `x` (tokens, in) through its pair, of any kind, to (tokens of the share, out)."""
        return cast(Tensor, pair(x[share.start : share.stop], self.base, self.bias, self.products))

    def _plain(self, x: Tensor, shares: Sequence[tuple[Share, LoraPair]], start: int, stop: int) -> Tensor:
        """Computes the tokens start … stop − 1; no share crosses their ends."""
        own = [
            (replace(share, start=share.start - start, stop=share.stop - start), pair)
            for share, pair in shares
            if start <= share.start and share.stop <= stop
        ]
        return shared_low_rank(x[start:stop], self.base, own, bias=self.bias, products=self.products)


def require_no_mix(shares: Sequence[tuple[Share, LoraPair]]) -> list[tuple[Share, LoraPair]]:
    """The shares of one layer whose pairs are more than A and B. Raises ValueError if one is weighted, or overlaps another."""
    found = [(share, pair) for share, pair in shares if not pair.plain]
    for share, _ in found:
        here = sum(other.start < share.stop and share.start < other.stop for other, _ in shares)
        if here > 1 or share.weight != 1.0:
            raise ValueError("DoRA, biases and dropout have no weighted mix within a batch: their effects do not add up")
    return found


PairCopies = PairStack | MixRows  # pairs of layers with the same input


class SharedInput:
    """What layers with the same input x share in divided batches and inference: one product shrinks x for the pairs of all of
    them.

    It is called with the layers, always the same ones, and keeps none of them.
    """

    def __init__(self) -> None:
        self._stack: PairCopies | None = None
        self._selection: Selection | None = None  # whose mixes the stack stores
        self._to: BatchAssignment | None = None  # what the stack is prepared for, after which change of adapters
        self._changes = -1
        self._products: torch.dtype | None = None
        self._biases: list[Tensor | None] = []
        self._together: ReorderedProducts | None = None  # the frozen weights

    def __deepcopy__(self, memo: dict[int, object]) -> SharedInput:
        """A new one for copied layers, which store nothing yet."""
        return SharedInput()

    def __call__(self, layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
        """x (tokens, in) to (tokens, out) of each layer. Special pairs compute their tokens separately."""
        products = layers[0].products or x.dtype
        to, stack = self.prepared(layers, len(x), products, x.device)
        special = stack.meets_special(to)
        nothing = stack.empty and not special
        if nothing and not all(isinstance(layer.base, ReorderedBase) for layer in layers):
            return [layer.bare(x) for layer in layers]
        wide = x.to(products)
        ys = self._frozen(layers)(wide)
        for y, bias in zip(ys, self._biases, strict=True):
            if bias is not None:
                y.add_(bias)
        if not nothing:
            stack.add(ys, wide, to)
        ys = ys if products == x.dtype else [y.to(x.dtype) for y in ys]
        if special:
            for layer, y in zip(layers, ys, strict=True):
                for share, pair in require_no_mix(layer.uses(len(x))):
                    y[share.start : share.stop] = layer.by_itself(x, share, pair)
        return ys

    def prepared(
        self, layers: Sequence[LoraLinear], tokens: int, products: torch.dtype, device: torch.device
    ) -> tuple[BatchAssignment, PairCopies]:
        """How layers with so many tokens compute the divided batch, and the copies of the pairs that it uses."""
        selection, stack = layers[0].selection, self._stack
        to = selection.assignment(tokens, device)
        if stack is None or self._to is not to or self._changes != selection.changes or self._products != products:
            stack = self._holding(layers, to, products, device)
        return to, stack

    def _frozen(self, layers: Sequence[LoraLinear]) -> ReorderedProducts:
        bases = [layer.base for layer in layers]
        if self._together is None or not all(map(operator.is_, self._together.bases, bases)):
            self._together = ReorderedProducts(bases)
        return self._together

    def _holding(
        self, layers: Sequence[LoraLinear], to: BatchAssignment, products: torch.dtype, device: torch.device
    ) -> PairCopies:
        """The stack, after storing the mixes of `to`."""
        selection, stack = layers[0].selection, self._stack
        changes = selection.changes  # an adapter may be attached meanwhile: then this runs again
        if stack is None or self._products != products or self._selection is not selection:
            stack = self._stack = _stack_of(layers, products, device)
            self._to, self._changes, self._products, self._selection = None, -1, products, selection
        if self._changes != changes:
            self._biases = [layer.bias for layer in layers]
        self._to = None
        if isinstance(stack, MixRows):
            stack.hold(to, selection)
        else:  # plain dicts: this runs for every layer as rows come and go
            stack.hold(to, [cast("dict[str, LoraPair]", layer.adapters._modules) for layer in layers], selection)
        self._to, self._changes = to, changes
        return stack


def _stack_of(layers: Sequence[LoraLinear], products: torch.dtype, device: torch.device) -> PairCopies:
    """Empty copies for the pairs of layers with the same input."""
    shapes, selection = [layer.base.shape for layer in layers], layers[0].selection
    if (kernel := inference_pairs(products, device, shapes)) is not None:
        return MixRows([(layer.adapters, shape) for layer, shape in zip(layers, shapes, strict=True)], selection, kernel)
    stack = PairStack(shapes, products, device)
    selection.register(stack)
    return stack


class LoraEmbedding(AdaptedLayer):
    """nn.Embedding, also Gemma's scaled one: ids to W[ids] + scale·A[:, ids]ᵀ·Bᵀ."""

    original: nn.Embedding

    def forward(self, ids: Tensor) -> Tensor:
        y = cast(Tensor, self.original(ids))
        if self.selection.shares is not None:
            flat, rows = ids.reshape(-1), y.reshape(-1, y.shape[-1])
            for share, held in self.uses(len(flat)):
                places = torch.arange(share.start, share.stop, device=rows.device)
                rows = rows.index_add(0, places, self._low_rank(flat[places], held, share.weight).to(y.dtype))
            return rows.view(y.shape)
        pair = self.pair()
        return y if pair is None else y + self._low_rank(ids, pair).to(y.dtype)

    def _low_rank(self, ids: Tensor, pair: LoraPair, weight: float = 1.0) -> Tensor:
        """The pair's part of the rows of `ids` (…): (…, hidden), fp32."""
        shrunk = nn.functional.embedding(ids, pair.A.t())  # (…, rank)
        return weight * pair.scale * embed_scale(self.original) * (shrunk @ pair.B.t())


def embed_scale(module: nn.Module) -> float:
    """Gemma multiplies an embedding by √hidden, rounded to the weight's dtype; the low-rank part needs the same factor."""
    scale = getattr(module, "scalar_embed_scale", None)  # the number behind transformers' buffer, which may be on a GPU
    return _rounded(float(getattr(module, "embed_scale", 1.0) if scale is None else scale), cast(Tensor, module.weight).dtype)


@lru_cache
def _rounded(number: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(number).to(dtype))


class LoraConv2d(AdaptedLayer):
    """nn.Conv2d with one group: a k×k convolution to `rank` channels, then a 1×1 one."""

    original: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        self.require_undivided("pairs on convolutions")
        pair = self.pair()
        if pair is None:
            return cast(Tensor, self.original(x))
        conv, dtype = self.original, x.dtype
        dropped = nn.functional.dropout(x, pair.dropout, pair.training)
        shrunk = nn.functional.conv2d(dropped, pair.A.to(dtype), stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
        bias = None if pair.bias is None else pair.bias.to(dtype)
        low_rank = nn.functional.conv2d(shrunk, pair.B.to(dtype), bias) * pair.scale
        if not isinstance(pair, DoraPair):
            return cast(Tensor, conv(x)) + low_rank
        plain = nn.functional.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation)
        y = ((plain + low_rank) * pair.gain(_FlatConv(conv), dtype).view(1, -1, 1, 1)).to(dtype)
        return y if conv.bias is None else y + conv.bias.view(1, -1, 1, 1)


class _FlatConv(DenseBase):
    """A convolution's weight as (out, in·k·k), for DoRA's row norms."""

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.module.weight).flatten(1)


def new_pair(entry: PlanEntry, *, weight: Callable[[], Tensor], seed: int, device: torch.device | str = "cpu") -> LoraPair:
    """An initialised pair as `entry` plans it; `weight()`, called only if needed, gives the frozen W with output rows first."""
    pair: LoraPair = DoraPair(entry, device=device) if entry.variant == "dora" else LoraPair(entry, device=device)
    needs_weight = entry.start in FACTORED
    initialise(pair, entry.start, weight=weight() if needs_weight else torch.empty(0), path=entry.path, seed=seed)
    if isinstance(pair, DoraPair):
        pair.measure(weight())
    return pair


def dense_base_of(module: Any, kind: str) -> FrozenBase:
    """The FrozenBase over a dense linear module; quantised ones come from `quant/construct`."""
    return TransposedBase(module) if kind == "conv1d" else DenseBase(module)
