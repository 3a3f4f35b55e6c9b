"""LoRA on the 3-D expert parameters of a mixture-of-experts block (Mixtral, Qwen-MoE and relatives in transformers 5).

The block keeps all experts in two parameters, `gate_up_proj` (experts, 2·width, hidden) or without gates `up_proj` (experts,
width, hidden), and `down_proj` (experts, hidden, width); gpt-oss stores both transposed, with biases beside them. A pair per
parameter holds A (experts, rank, in) and B (experts, out, rank); each expert sees its own tokens through the same autograd
function as a linear layer. Where tokens of a batch use different adapters, those of an expert lie in spans, a span an adapter:

    tokens of expert e, in order:  ▓▓▓▓▓░░░▒▒▒▒   one product with W_e; then w·s·x·A_eᵀ·B_eᵀ of adapter ▓ and of ▒; ░ is the base

Llama 4 calls its experts with rows for all of them, zeros where a token did not choose one, and stores (experts, in, out) without
saying so. PEFT takes that for (experts, out, in), so a pair there holds A (experts, rank, out) and B (experts, in, rank).
LongCat-Flash's last experts have no down_proj: their tokens pass through.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lorakeet.core.base import FrozenBase, FrozenStack, SliceBase, TransposedSliceBase
from lorakeet.core.batched.stack import spans_low_rank
from lorakeet.core.layers.grouped_experts import Sorted, grouped_low_rank, why_not_grouped
from lorakeet.core.layers.linear import AdaptedLayer
from lorakeet.core.lowrank import LoraPair, frozen_linear, low_rank_linear
from lorakeet.core.pair_products import PairSpan
from lorakeet.core.selection import Share

_FOR_ALL = ("Llama4TextExperts",)  # called with rows for all experts; parameters (experts, in, out)


class ExpertPairs(nn.ModuleDict):
    """The pairs of one adapter on one block, by parameter name."""


class _Span(NamedTuple):
    """The rows start … stop − 1 of an expert's tokens use these pairs with this weight."""

    start: int
    stop: int
    weight: float
    pairs: ExpertPairs


class LoraExperts(AdaptedLayer):
    """A block of experts with the call (hidden, top_k_index, top_k_weights) that transformers 5 gives it, or Llama 4's.

    `tokens` counts by expert the tokens of training. `choices` is how many experts a token of Llama 4 chooses at most; None: all.
    """

    choices: int | None = None

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
        return len(stack_of(self.original, "down_proj"))

    def base(self, name: str, expert: int) -> FrozenBase:
        """The frozen matrix (out, in) of an expert, of the parameter `name`."""
        stacked = stack_of(self.original, name)
        if not isinstance(stacked, Tensor):
            return stacked.matrix(expert)
        across = stored_transposed(self.original) or unsaid_transposed(self.original)
        return (TransposedSliceBase if across else SliceBase)(stacked, expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None) -> Tensor:
        """hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, k) to (tokens, hidden).

        Alone, hidden_states are (experts·tokens, hidden), and so is the result.
        """
        if top_k_index is None or top_k_weights is None:
            return self._of_rows(hidden_states) if self.in_use else cast(Tensor, self.original(hidden_states))
        if not self.in_use:
            return cast(Tensor, self.original(hidden_states, top_k_index, top_k_weights))
        counting = self.training and torch.is_grad_enabled()  # a streamed block runs a second time without gradients
        first, active = first_stack(self.original), self.active
        pairs = None if active is None else cast(ExpertPairs, self.adapters[active])
        if pairs is not None and not self._why_not_grouped(pairs, first, hidden_states):
            choices = Sorted.of(top_k_index, top_k_weights, self.count)
            return self._grouped(pairs, first, hidden_states, choices, counting=counting)
        own = self._pairs_over(len(hidden_states), hidden_states.device)
        result = torch.zeros_like(hidden_states)
        if pass_through(self.original):
            weights = torch.where(top_k_index >= self.count, top_k_weights, 0).sum(1, keepdim=True)
            result = (hidden_states * weights).to(result.dtype)
        for expert, token, weight in shares_of_experts(top_k_index, top_k_weights, self.count):
            if counting:
                self._tokens[expert] += len(token)
            out = self._of_expert(own, expert, token, hidden_states[token])
            result = result.index_add(0, token, (out * weight).to(result.dtype))
        return result

    def _of_rows(self, hidden_states: Tensor) -> Tensor:
        """Rows of each expert one after another, (experts·tokens, hidden), to as many; rows of zeros stay zeros."""
        rows = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        tokens, counting = rows.shape[1], self.training and torch.is_grad_enabled()
        numbers = rows.detach()
        chosen = ((numbers.amax(-1) != 0) | (numbers.amin(-1) != 0)).t()  # (tokens, experts)
        index = chosen.float().topk(min(self.choices or self.count, self.count), dim=1).indices
        own = self._pairs_over(tokens, rows.device)
        places, found = [], []
        for expert, token, _ in shares_of_experts(index, torch.ones_like(index), self.count):
            if counting:
                self._tokens[expert] += len(token)
            found.append(self._of_expert(own, expert, token, rows[expert].index_select(0, token)))
            places.append(token + expert * tokens)
        if not found:
            return torch.zeros_like(hidden_states)
        return torch.zeros_like(hidden_states).index_add(0, torch.cat(places), torch.cat(found).to(hidden_states.dtype))

    def _pairs_over(self, tokens: int, device: torch.device) -> ExpertPairs | _DividedTokens:
        """The pairs of all of so many tokens, or how a divided batch shares them out."""
        active = self.active
        return self._divided(tokens, device) if active is None else cast(ExpertPairs, self.adapters[active])

    def _of_expert(self, own: ExpertPairs | _DividedTokens, expert: int, token: Tensor, x: Tensor) -> Tensor:
        """What an expert makes of its tokens x (n, hidden), whose numbers in the batch are `token` (n,)."""
        pairs = own.spans(token) if isinstance(own, _DividedTokens) else own
        inner = self._gated(self._project(pairs, first_stack(self.original), expert, x))
        return self._project(pairs, "down_proj", expert, inner)

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
        if pass_through(self.original):
            return "some experts pass their tokens through"
        stacks = [stack_of(self.original, name) for name in (first, "down_proj")]
        if not all(isinstance(stacked, Tensor) for stacked in stacks):
            return "experts are packed"
        matrices = [stacked.shape[1:] for stacked in stacks]
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
        biases, across = getattr(self.original, f"{name}_bias", None), unsaid_transposed(self.original)
        base = self.base(name, expert)

        def factors(pair: LoraPair) -> tuple[Tensor, Tensor]:
            A, B = pair.A[expert], pair.B[expert]
            return (B.t().contiguous(), A.t().contiguous()) if across else (A, B)

        if not isinstance(own, ExpertPairs):
            here = [(span, cast(LoraPair, span.pairs[name])) for span in own if name in span.pairs]
            spans = [PairSpan(span.start, span.stop, span.weight * pair.scale) for span, pair in here]
            numbers = [factor for _, pair in here for factor in factors(pair)]
            out = spans_low_rank(x, base, spans, numbers, products=self.products)
        elif name not in own:
            out = frozen_linear(x, base, products=self.products)
        else:
            pair = cast(LoraPair, own[name])
            dropout = pair.dropout if pair.training else 0.0
            out = low_rank_linear(x, base, (*factors(pair), pair.scale), dropout=dropout, products=self.products)
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


def stack_of(module: nn.Module, name: str) -> Tensor | FrozenStack:
    """The parameter `name` of a block of experts, or what stands for it where it is packed."""
    return cast("Tensor | FrozenStack", getattr(module, name))


def input_width(module: nn.Module) -> int:
    """The width of what a block of experts is called with."""
    shape = stack_shape(module, first_stack(module))
    return shape[1] if unsaid_transposed(module) else shape[2]


def placed_as(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the parameters of a block of experts are, and of which dtype, packed or not."""
    stacked = cast(Tensor, stack_of(module, "down_proj"))
    return stacked.device, stacked.dtype


def stored_transposed(module: nn.Module) -> bool:
    """True if a block of experts keeps its parameters as (experts, in, out)."""
    return bool(getattr(module, "is_transposed", False))


def unsaid_transposed(module: nn.Module) -> bool:
    """True for Llama 4's block of experts: PEFT takes its (experts, in, out) for (experts, out, in), and so do pairs here."""
    return type(module).__name__ in _FOR_ALL


def pass_through(module: nn.Module) -> bool:
    """True if the tokens of a block's last experts, which have no down_proj, pass through as they are."""
    return hasattr(module, "identity_expert")


def stack_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape (experts, out, in) of the parameter `name` of a block of experts, however it is stored.

    Of Llama 4's as PEFT takes it, (experts, in, out).
    """
    stacked = stack_of(module, name)
    experts, *matrix = stacked.shape
    return (experts, *(matrix[::-1] if isinstance(stacked, Tensor) and stored_transposed(module) else matrix))


def why_not_experts(module: nn.Module) -> str:
    """Why LoRA cannot be put on this block of experts; an empty string when it can."""
    first = first_stack(module)
    if getattr(module, "has_post_expert_norm", False):
        return "its experts end in a norm"
    stacks = [getattr(module, name, None) for name in (first, "down_proj")]
    if not all(isinstance(stacked, nn.Parameter) or hasattr(stacked, "matrix") for stacked in stacks):
        return "it has no gate_up_proj and down_proj parameters"
    if len(stack_of(module, first)) != len(stack_of(module, "down_proj")) and not pass_through(module):
        return "some of its experts have no down_proj"
    try:
        inspect.signature(module.forward).bind(*[None] * (1 if unsaid_transposed(module) else 3))
    except TypeError:
        return "its experts are not called with the experts that each token chose"
    return "" if hasattr(module, "_apply_gate") or hasattr(module, "act_fn") else "it has no act_fn"
