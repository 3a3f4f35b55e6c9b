"""LoRA on the 3-D expert parameters of a mixture-of-experts block (Mixtral, Qwen-MoE and relatives in transformers 5).

The block keeps all experts in two parameters, `gate_up_proj` (experts, 2·width, hidden) or without gates `up_proj` (experts,
width, hidden), and `down_proj` (experts, hidden, width); gpt-oss stores both transposed, with biases beside them. A pair per
parameter holds A (experts, rank, in) and B (experts, out, rank); each expert sees its own tokens through the same autograd
function as a linear layer. Where tokens of a batch use different adapters, those of an expert lie in spans, a span an adapter:

    tokens of expert e, in order:  ▓▓▓▓▓░░░▒▒▒▒   one product with W_e; then w·s·x·A_eᵀ·B_eᵀ of adapter ▓ and of ▒; ░ is the base
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lorakeet.core.base import SliceBase, TransposedSliceBase
from lorakeet.core.batched.stack import spans_low_rank
from lorakeet.core.layers.grouped_experts import Sorted, grouped_low_rank, why_not_grouped
from lorakeet.core.layers.linear import AdaptedLayer
from lorakeet.core.lowrank import LoraPair, frozen_linear, low_rank_linear
from lorakeet.core.pair_products import PairSpan
from lorakeet.core.selection import Share


class ExpertPairs(nn.ModuleDict):
    """The pairs of one adapter on one block, by parameter name."""


class _Span(NamedTuple):
    """The rows start … stop − 1 of an expert's tokens use these pairs with this weight."""

    start: int
    stop: int
    weight: float
    pairs: ExpertPairs


class LoraExperts(AdaptedLayer):
    """A block of experts with the call (hidden, top_k_index, top_k_weights) that transformers 5 gives it.

    `tokens` counts by expert the tokens of training.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self._tokens: Counter[int] = Counter()
        self._counted: Tensor | None = None  # of grouped products, on their device

    @property
    def tokens(self) -> Counter[int]:
        """By expert, the tokens of training so far."""
        if self._counted is not None:
            self._tokens.update(dict(enumerate(self._counted.tolist())))
            self._counted = None
        return self._tokens

    @property
    def count(self) -> int:
        """The number of experts."""
        return len(cast(Tensor, self.original.down_proj))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, k) to (tokens, hidden)."""
        if not self.in_use:
            return cast(Tensor, self.original(hidden_states, top_k_index, top_k_weights))
        counting = self.training and torch.is_grad_enabled()  # a streamed block runs a second time without gradients
        first, active = first_stack(self.original), self.active
        pairs = None if active is None else cast(ExpertPairs, self.adapters[active])
        if pairs is not None and not self._why_not_grouped(pairs, first, hidden_states):
            choices = Sorted.of(top_k_index, top_k_weights, self.count)
            return self._grouped(pairs, first, hidden_states, choices, counting=counting)
        divided = None if pairs is not None else self._divided(len(hidden_states), hidden_states.device)
        result = torch.zeros_like(hidden_states)
        for expert, token, weight in shares_of_experts(top_k_index, top_k_weights, self.count):
            if counting:
                self._tokens[expert] += len(token)
            own = divided.spans(token) if divided is not None else cast(ExpertPairs, pairs)
            inner = self._gated(self._project(own, first, expert, hidden_states[token]))
            out = self._project(own, "down_proj", expert, inner)
            result = result.index_add(0, token, (out * weight).to(result.dtype))
        return result

    def _divided(self, tokens: int, device: torch.device) -> _DividedTokens:
        """The adapters of a batch of so many tokens. Raises ValueError for pairs that drop numbers, which are not computed so."""
        held, given = self._adapters, self.selection.shares_over(tokens)
        shares = [(share, cast(ExpertPairs, held[share.name])) for share in given if share.name in held]
        if not all(cast(LoraPair, pair).plain for _, pairs in shares for pair in pairs.values()):
            raise ValueError("dropout of pairs on experts cannot differ within a batch; switch between adapters instead")
        return _DividedTokens(shares, device)

    def _why_not_grouped(self, pairs: ExpertPairs, first: str, x: Tensor) -> str:
        """Why each expert computes its tokens for itself; empty where grouped products compute those of all (grouped_experts)."""
        if any(cast(LoraPair, pair).dropout > 0 and pair.training for pair in pairs.values()):
            return "pairs drop numbers"
        matrices = [cast(Tensor, getattr(self.original, name)).shape[1:] for name in (first, "down_proj")]
        ranks = [cast(LoraPair, pair).rank for pair in pairs.values()]
        return why_not_grouped(x, self.products, (*(width for matrix in matrices for width in matrix), *ranks))

    def _grouped(self, pairs: ExpertPairs, first: str, x: Tensor, choices: Sorted, *, counting: bool) -> Tensor:
        """All experts at once."""
        if counting:
            counts = torch.diff(choices.ends, prepend=choices.ends.new_zeros(1))
            self._counted = counts if self._counted is None else self._counted + counts

        def project(name: str, rows: Tensor) -> Tensor:
            stacked, biases = cast(Tensor, getattr(self.original, name)), getattr(self.original, f"{name}_bias", None)
            weight = stacked.mT if stored_transposed(self.original) else stacked
            pair = cast(LoraPair, pairs[name]) if name in pairs else None
            out = grouped_low_rank(rows, weight, choices.ends, None if pair is None else (pair.A, pair.B, pair.scale))
            return out if biases is None else out + biases.index_select(0, choices.experts).to(out.dtype)

        out = project("down_proj", self._gated(project(first, x.index_select(0, choices.tokens))))
        return torch.zeros_like(x).index_add(0, choices.tokens, (out * choices.weights).to(x.dtype))

    def _gated(self, gate_up: Tensor) -> Tensor:
        """act(gate)·up, (tokens, 2·width) to (tokens, width), by the block's own function where it has one: some clamp both.

        act(up) of experts without gates, (tokens, width).
        """
        if first_stack(self.original) == "up_proj":
            return cast(Tensor, self.original.act_fn(gate_up))  # type: ignore[operator]
        own = getattr(self.original, "_apply_gate", None)
        if own is not None:
            return cast(Tensor, own(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return cast(Tensor, self.original.act_fn(gate)) * up  # type: ignore[operator]

    def _project(self, own: ExpertPairs | Sequence[_Span], name: str, expert: int, x: Tensor) -> Tensor:
        """x (tokens of the expert, in) to (…, out) through its matrix of this parameter, with the pairs of all or each span."""
        stacked, biases = cast(Tensor, getattr(self.original, name)), getattr(self.original, f"{name}_bias", None)
        base = (TransposedSliceBase if stored_transposed(self.original) else SliceBase)(stacked, expert)
        if not isinstance(own, ExpertPairs):
            here = [(span, cast(LoraPair, span.pairs[name])) for span in own if name in span.pairs]
            spans = [PairSpan(span.start, span.stop, span.weight * pair.scale) for span, pair in here]
            numbers = [factor[expert] for _, pair in here for factor in (pair.A, pair.B)]
            out = spans_low_rank(x, base, spans, numbers, products=self.products)
        elif name not in own:
            out = frozen_linear(x, base, products=self.products)
        else:
            pair = cast(LoraPair, own[name])
            dropout = pair.dropout if pair.training else 0.0
            factors = pair.A[expert], pair.B[expert], pair.scale
            out = low_rank_linear(x, base, factors, dropout=dropout, products=self.products)
        return out if biases is None else out + biases[expert].to(out.dtype)


class _DividedTokens:
    """The adapters of a batch's tokens. On a CUDA device the host waits once for each expert."""

    def __init__(self, shares: Sequence[tuple[Share, ExpertPairs]], device: torch.device) -> None:
        """Each share with its adapter's pairs; they may overlap."""
        self._shares = shares
        self._ends = torch.tensor([(share.start, share.stop) for share, _ in shares], device=device)

    def spans(self, token: Tensor) -> list[_Span]:
        """Where among an expert's tokens (n,), which ascend, those of each share lie; shares without any are left out."""
        found = torch.searchsorted(token.contiguous(), self._ends).tolist()
        return [
            _Span(start, stop, share.weight, pairs)
            for (start, stop), (share, pairs) in zip(found, self._shares, strict=True)
            if start < stop
        ]


def shares_of_experts(top_k_index: Tensor, top_k_weights: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert below `count` that any token chose, with the tokens (n,) that chose it, and their weights (n, 1), in order.

    transformers marks a dropped choice by an index past the last expert. On a CUDA device the host waits once: tokens are sorted
    by expert there, and only how many each has is read.
    """
    if top_k_index.device.type != "cuda":
        for expert in (each for each in chosen_experts(top_k_index) if each < count):
            token, choice = torch.where(top_k_index == expert)
            yield expert, token, top_k_weights[token, choice, None]
        return
    experts, order = top_k_index.flatten().sort(stable=True)
    edges = torch.searchsorted(experts, torch.arange(count + 1, device=experts.device)).tolist()
    tokens, weights = order // top_k_index.shape[1], top_k_weights.flatten().index_select(0, order)[:, None]
    for expert, (start, stop) in enumerate(pairwise(edges)):
        if start < stop:
            yield expert, tokens[start:stop], weights[start:stop]


def chosen_experts(top_k_index: Tensor) -> list[int]:
    """The experts that any token chose, in order; reads few numbers: each costs a rehearsal (memory/ledger)."""
    numbers = top_k_index.flatten().sort().values
    return cast(list[int], torch.unique_consecutive(numbers).tolist())


def first_stack(module: nn.Module) -> str:
    """The name of the parameter that a block's experts begin with: up_proj where they have no gate."""
    return "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"


def stored_transposed(module: nn.Module) -> bool:
    """True if a block of experts keeps its parameters as (experts, in, out)."""
    return bool(getattr(module, "is_transposed", False))


def stack_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape (experts, out, in) of the parameter `name` of a block of experts, however it is stored."""
    experts, *matrix = module.get_parameter(name).shape
    return (experts, *(matrix[::-1] if stored_transposed(module) else matrix))


def why_not_experts(module: nn.Module) -> str:
    """Why LoRA cannot be put on this block of experts; an empty string when it can."""
    first = first_stack(module)
    if getattr(module, "has_post_expert_norm", False):
        return "its experts end in a norm"
    if not all(isinstance(getattr(module, name, None), nn.Parameter) for name in (first, "down_proj")):
        return "it has no gate_up_proj and down_proj parameters"
    if len(cast(Tensor, getattr(module, first))) != len(cast(Tensor, module.down_proj)):
        return "some of its experts have no down_proj"  # LongCat-Flash's pass their tokens through
    try:
        inspect.signature(module.forward).bind(None, None, None)
    except TypeError:
        return "its experts are not called with the experts that each token chose"  # Llama 4 sorts tokens by expert
    return "" if hasattr(module, "_apply_gate") or hasattr(module, "act_fn") else "it has no act_fn"
