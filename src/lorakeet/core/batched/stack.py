"""One pass over a frozen base whose tokens use different pairs: some adapter, none, or a weighted mix of several.

    x ──┬── frozen base: x·Wᵀ ──────────────────────────────────── y
        ├── tokens of share 1:  w₁·s₁ · x·A₁ᵀ·B₁ᵀ ── added to its part of y
        └── tokens of share 2:  w₂·s₂ · x·A₂ᵀ·B₂ᵀ ── added to its part of y       (shares may overlap: a mix)

There are two ways, equal to rounding. Share by share is differentiable and costs some products for each share. Stacked, for
inference, each mix has rows in one table of A's and one of B's, for layers with the same input. Generated tokens gather their
rows one by one, and prompts of many tokens are multiplied together (core/batched/padded_parts): the number of products does not
depend on the number of adapters. With C kernels, core/batched/mix_copies takes the place of a stack.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakeet.core.base import FrozenBase
from lorakeet.core.batched.mixture import CopySource, Factors, Held, all_plain, factors_of, mixtures
from lorakeet.core.batched.padded_parts import PaddedPart, PaddedParts, padded
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.pair_products import PairProducts, PairSpan, alternated
from lorakeet.core.selection import PATIENCE, BatchAssignment, Selection, Share
from lorakeet.kernels.device import is_cpu


class SharedLowRank(torch.autograd.Function):
    """y = x·Wᵀ + b, plus w·s·x·Aᵀ·Bᵀ on each share's tokens. Backward as in LowRankLinear, share by share.

    With g = ∂L/∂y and, on the tokens of share i, uᵢ = wᵢ·sᵢ·g·Bᵢ:

        ∂L/∂Aᵢ = uᵢᵀ·x      ∂L/∂Bᵢ = wᵢ·sᵢ·gᵀ·(x·Aᵢᵀ)      ∂L/∂x = g·W + Σ uᵢ·Aᵢ on the tokens of each i
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: FrozenBase, bias: Tensor | None, pairs: PairProducts, *factors: Tensor) -> Tensor:
        wide = x.to(pairs.products)
        y = base.matmul(wide)
        if bias is not None:
            y.add_(bias)
        shrunk = pairs.add([y], wide, factors)
        ctx.save_for_backward(x, *shrunk, *factors)
        ctx.base, ctx.pairs, ctx.shrunk = base, pairs, len(shrunk)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pairs: PairProducts = ctx.pairs
        x, saved = ctx.saved_tensors[0], ctx.saved_tensors[1:]
        shrunk, factors = saved[: ctx.shrunk], saved[ctx.shrunk :]
        grad, wide = grad.to(pairs.products).contiguous(), x.to(pairs.products)
        grad_x = ctx.base.matmul_t(grad) if ctx.needs_input_grad[0] else None
        through, of_b = pairs.backward(grad_x, [grad], shrunk, factors)
        of_a = pairs.of_a(through, wide, factors) if any(ctx.needs_input_grad[4::2]) else [None] * len(of_b)
        wanted = zip(ctx.needs_input_grad[4:], alternated(of_a, of_b), strict=True)
        grads = (found if wants else None for wants, found in wanted)
        return None if grad_x is None else grad_x.to(x.dtype), None, None, None, *grads


def shared_low_rank(
    x: Tensor,
    base: FrozenBase,
    shares: Sequence[tuple[Share, LoraPair]],
    *,
    bias: Tensor | None = None,
    products: torch.dtype | None = None,
) -> Tensor:
    """x (tokens, in) to (tokens, out), each share with its plain pair (no dropout, no bias, no DoRA), differentiable."""
    spans = [PairSpan(share.start, share.stop, share.weight * pair.scale) for share, pair in shares]
    factors = [factor for _, pair in shares for factor in pair.factors()]
    return spans_low_rank(x, base, spans, factors, bias=bias, products=products)


def spans_low_rank(
    x: Tensor,
    base: FrozenBase,
    spans: Sequence[PairSpan],
    factors: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    products: torch.dtype | None = None,
) -> Tensor:
    """x (rows, in) to (rows, out), each span of rows with its A and B, which alternate in `factors`; differentiable."""
    apply: Any = SharedLowRank.apply
    return cast(Tensor, apply(x, base, bias, PairProducts(spans, products or x.dtype), *factors))


@dataclass(frozen=True)
class _Sums:
    """What consecutive layers of one width add to their y: their part of the dot products, the rows of their B's, and where each
    layer's and token's rows start. `layers` are those on which some token has a pair.
    """

    layers: tuple[int, ...]
    part: slice
    rows: Tensor
    firsts: Tensor


@dataclass(frozen=True)
class _Picks:
    """The rows of a stack's tables that the tokens use.

    Tokens that are computed one by one, layer by layer: `tokens` and `rows` (n,), x[tokens[i]] is multiplied with row rows[i] of
    all A's. `sums` are for each table of B's. `long` are the other tokens.
    """

    tokens: Tensor
    rows: Tensor
    sums: tuple[_Sums, ...]
    long: tuple[PaddedParts, ...]

    @classmethod
    def of(cls, to: BatchAssignment, rows_of: Mapping[int, _PairRows], tables: Sequence[int], device: torch.device) -> _Picks:
        """`tables` are the tables of B's by layer."""
        tokens: list[int] = []
        rows: list[int] = []
        sums = []
        for _, alike in itertools.groupby(range(len(tables)), tables.__getitem__):
            begin, own, firsts, layers = len(rows), list[int](), list[int](), []
            for layer in alike:
                seen = [(token, rows_of[place].of_a[layer], rows_of[place].of_b[layer]) for token, place in to.at]
                if not any(within.stop > within.start for _, _, within in seen):
                    continue
                layers.append(layer)
                for token, above, within in seen:
                    firsts.append(len(own))
                    own += range(within.start, within.stop)
                    rows += range(above.start, above.stop)
                    tokens += [token] * (above.stop - above.start)
            if layers:
                part = slice(begin, len(rows))
                sums.append(_Sums(tuple(layers), part, _numbers(own, device), _numbers(firsts, device)))
        long = [PaddedPart(part, rows_of[place].all_of_a, rows_of[place].of_b) for part, place in to.long]
        return cls(_numbers(tokens, device), _numbers(rows, device), tuple(sums), padded(long, device))


@dataclass(frozen=True)
class _PairRows:
    """The rows of a slot in the tables: of each layer's A's, consecutive among all A's, and of its B's."""

    of_a: tuple[slice, ...]
    of_b: tuple[slice, ...]

    @property
    def all_of_a(self) -> slice:
        return slice(self.of_a[0].start, self.of_a[-1].stop)

    @property
    def key(self) -> tuple[int, ...]:
        return tuple(end for rows in (*self.of_a, *self.of_b) for end in (rows.start, rows.stop))


class PairStack:
    """The pairs of several adapters on layers with the same input, by the slots of a BatchAssignment; for inference.

    All A's are one table (rows, in), the B's of consecutive layers of one width one of (rows, out), since each access to a table
    has a fixed cost. A slot has as many rows as its mix has ranks, layer after layer; B's include weight and scale. Copies are
    made in the dtype `products` when a mix gets a slot, so that A and B are rounded as the layers round them for an adapter that
    all tokens use.

    The tables have at most as many rows as one batch needed; unused mixes stay while their rows are not needed. The tables shrink
    after PATIENCE batches in a row that needed less than half.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], products: torch.dtype, device: torch.device) -> None:
        """For weights of `shapes` (out, in); starts empty."""
        self.shapes, self.products, self.device = tuple(shapes), products, device
        self.special: set[int] = set()  # slots of mixes with a special pair on some layer, which is not stored
        self.empty = True  # whether no mix has a pair here
        self.bytes = 0  # of the tables
        self._A = RowTable(shapes[0][1], products, device)
        outs = [out for out, _ in shapes]
        others = (out != before for before, out in itertools.pairwise(outs))
        self._table = tuple(itertools.accumulate(others, initial=0))  # index of the table of B's, by layer
        self._Bs = [RowTable(out, products, device) for out, _ in itertools.groupby(outs)]
        self._ranks: dict[int, tuple[int, ...]] = {}  # by slot, for each layer
        self._copies: dict[int, CopySource] = {}  # by place
        self._rows_of: dict[int, _PairRows] = {}  # by place
        self._picked: tuple[BatchAssignment, _Picks] | None = None  # the last ones
        self._oversized = 0  # batches in a row that needed less than half of the rows

    @property
    def _tables(self) -> tuple[RowTable, ...]:
        return self._A, *self._Bs

    def release(self) -> None:
        """Frees all copies."""
        for place in list(self._ranks):
            self._drop(place)
        self._remake((), fit=True)

    def hold(self, to: BatchAssignment, pairs: Held, selection: Selection) -> None:
        """Stores the mix of `pairs` of each slot in use; an adapter without a pair here adds nothing.

        Copies what is missing, or was copied before an adapter was attached, detached or trained.
        """
        wanted = selection.states(to)
        copies = {place: self._copies.get(place) for place in wanted}
        lacking = [place for place, copy in copies.items() if copy is None or not copy.stands_for(wanted[place])]
        new = {place: mixtures(to.places[place], pairs) for place in lacking}
        if new:
            factors = {place: [factors_of(mixture) for mixture in layers] for place, layers in new.items()}
            self._allocate(factors, wanted)
            for place, layers in new.items():
                if not all(map(all_plain, layers)):
                    self.special.add(place)
                self._copy(place, factors[place])
                self._copies[place] = CopySource.of(wanted[place], layers)
            self.empty = not any(map(any, self._ranks.values()))
        needed = sum(sum(self._ranks[place]) for place in wanted)
        self._oversized = self._oversized + 1 if 2 * needed < len(self._A.numbers) else 0
        if self._oversized >= PATIENCE:
            self._remake(wanted, fit=True)

    def meets_special(self, to: BatchAssignment) -> bool:
        """True if a mix of the assignment has a special pair here."""
        return not self.special.isdisjoint(to.used)

    def add(self, ys: Sequence[Tensor], x: Tensor, to: BatchAssignment) -> None:
        """Adds the pairs of the slots to each layer's y (tokens, out), in place, for x (tokens, in)."""
        wide = x.to(self.products)
        picks = self._picks(to)
        for parts in picks.long:
            parts.add(ys, wide, self._A.numbers, [self._Bs[table].numbers for table in self._table])
        if not len(picks.rows):
            return
        shrunk = row_dots(wide, picks.tokens, self._A.numbers, picks.rows)
        for sums in picks.sums:
            weights = shrunk if len(picks.sums) == 1 else shrunk[sums.part]
            found = row_sums(weights, self._Bs[self._table[sums.layers[0]]].numbers, sums.rows, sums.firsts)
            of_layers = [found] if len(sums.layers) == 1 else found.chunk(len(sums.layers))
            for layer, added in zip(sums.layers, of_layers, strict=True):
                y = ys[layer]
                y.add_(added) if to.tokens is None else y.index_add_(0, to.tokens, added.to(y.dtype))

    def _picks(self, to: BatchAssignment) -> _Picks:
        """The rows that the tokens use; computed once for all stacks with the same layout of tables."""
        if self._picked is None or self._picked[0] is not to:
            key = self._table, tuple((place, self._rows_of[place].key) for place in sorted(to.used))
            found = to.picked.get(key)
            if found is None:
                found = to.picked[key] = _Picks.of(to, self._rows_of, self._table, self.device)
            self._picked = to, cast(_Picks, found)
        return self._picked[1]

    def _allocate(self, new: Mapping[int, Sequence[Sequence[Factors]]], wanted: Iterable[int]) -> None:
        """Allocates rows for the `new` mixes among the `wanted` slots; frees unused ones, the oldest first, if needed."""
        without_rows = []
        for place, layers in new.items():
            ranks = tuple(sum(a.shape[0] for a, _, _ in factors) for factors in layers)
            if place in self._rows_of and self._ranks[place] == ranks:  # it reuses the rows of the slot's last mix
                self._ranks[place] = self._ranks.pop(place)  # as the newest
                self._copies.pop(place, None)
                self.special.discard(place)
                continue
            self._drop(place)
            self._ranks[place] = ranks
            without_rows.append(place)
        keep = set(wanted)
        unused = [place for place in self._ranks if place not in keep]
        for place in without_rows:
            while not self._take_rows(place):
                if not unused:
                    self._remake(keep)
                    return
                self._drop(unused.pop(0))

    def _take_rows(self, place: int) -> bool:
        """Allocates rows for a slot; False if there are not enough."""
        ranks = self._ranks[place]
        if not all(table.take(place, count) for table, count in zip(self._tables, self._rows(ranks), strict=True)):
            for table in self._tables:
                table.free(place)
            return False
        of_b = itertools.chain(*map(_below, (B.spans[place].start for B in self._Bs), self._by_table(ranks)))
        self._rows_of[place] = _PairRows(tuple(_below(self._A.spans[place].start, ranks)), tuple(of_b))
        return True

    def _by_table(self, ranks: Sequence[int]) -> list[list[int]]:
        """The ranks of layers, grouped by the table of their B's."""
        return [[ranks[layer] for layer in alike] for _, alike in itertools.groupby(range(len(ranks)), self._table.__getitem__)]

    def _rows(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """The number of rows that a mix of such ranks needs in each table."""
        return sum(ranks), *map(sum, self._by_table(ranks))

    def _drop(self, place: int) -> None:
        self._picked = None
        for known in (self._copies, self._ranks, self._rows_of):
            known.pop(place, None)
        self.special.discard(place)
        for table in self._tables:
            table.free(place)

    def _remake(self, wanted: Iterable[int], *, fit: bool = False) -> None:
        """Remakes the tables with the `wanted` slots only; with `fit`, without spare rows. Valid copies are kept."""
        self._picked, self._oversized = None, 0
        keep = set(wanted)
        for place in self._ranks.keys() - keep:
            self._drop(place)
        needed = [sum(of) for of in zip(*map(self._rows, self._ranks.values()), strict=True)]
        copies, self._copies = self._copies, {}  # if a table fails, no stale rows count as copies,
        self._rows_of.clear()  # nor as rows of their slots
        try:
            for table, rows in zip(self._tables, needed or [0] * (1 + len(self._Bs)), strict=True):
                table.remake(rows if fit else max(rows, len(table.numbers)), copies)
        finally:
            self.bytes = sum(table.numbers.nbytes for table in self._tables)
        for place in self._ranks:
            self._take_rows(place)  # there are rows for all
        self._copies = copies
        self.empty = not any(map(any, self._ranks.values()))

    def _copy(self, place: int, layers: Sequence[Sequence[Factors]]) -> None:
        own, A = self._rows_of[place], self._A.numbers
        for above, within, table, factors in zip(own.of_a, own.of_b, self._table, layers, strict=True):
            first, second, B = above.start, within.start, self._Bs[table]
            for a, b, scale in factors:
                rank = a.shape[0]
                A[first : first + rank].copy_(a)
                wide = b.t().to(torch.promote_types(b.dtype, self.products))  # else the product would be rounded to B's dtype
                torch.mul(wide, scale, out=B.numbers[second : second + rank])
                first, second = first + rank, second + rank


def _below(first: int, counts: Iterable[int]) -> Iterable[slice]:
    """Consecutive spans of `counts` rows, from the row `first` on."""
    return (slice(start, stop) for start, stop in itertools.pairwise(itertools.accumulate(counts, initial=first)))


def _numbers(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


_SUM = 0  # the mode of an embedding bag


def row_dots(x: Tensor, tokens: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """x[tokens[i]]·table[rows[i]] for each i: x (n, width), table (N, width), tokens and rows (k,), to (k,) in their dtype.

    Each row is read once and nothing copied. Batched products of one row each read bf16 at a fifth of the speed of memory on a
    CPU, and fp32 at half of it (docs/log); torch's kernels for embeddings read both at nearly full speed, and sum in fp32.
    """
    if is_cpu(x.device) and _adds_up_well(table.dtype):
        # The gradient of an embedding bag for the weights of its rows is just that; the offsets are not used.
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(x, table, rows, tokens, tokens, _SUM)  # type: ignore[no-any-return]
    return torch.bmm(table[rows].unsqueeze(1), x[tokens].unsqueeze(2)).flatten()


def row_sums(weights: Tensor, table: Tensor, rows: Tensor, firsts: Tensor) -> Tensor:
    """Σ weights[i]·table[rows[i]] over i from firsts[j] up to the next: table (N, width), weights and rows (k,), firsts (m,).

    (m, width), zeros where there is nothing to add.
    """
    return torch.embedding_bag(table, rows, firsts, False, _SUM, False, weights)[0]


@cache
def _adds_up_well(dtype: torch.dtype) -> bool:
    """True if torch has the kernel and it sums in more than `dtype`: tried on a few numbers."""
    if not hasattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward"):
        return False
    width = 1024
    table = torch.stack([torch.ones(width), torch.linspace(-1, 1, width)]).to(dtype)
    at = torch.tensor([0, 1])
    try:
        found = torch.ops.aten._embedding_bag_per_sample_weights_backward(table[:1], table, at, at, at.new_zeros(2), _SUM)
    except RuntimeError:
        return False
    return bool(torch.allclose(found.float(), table.float().sum(1), rtol=1e-2, atol=0.05))


class RowTable:
    """`numbers` (rows, width), and the `spans` of rows by owner, of unequal size, without padding.

    A new table has no rows; `remake` grows it.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.spans: dict[int, slice] = {}
        self.numbers = _rows(0, width, dtype, device)

    def take(self, owner: int, count: int) -> bool:
        """Allocates `count` rows to `owner`, unless it has them already; False if there is no such gap."""
        held = self.spans.get(owner)
        if held is not None:
            return bool(held.stop - held.start == count)
        first = 0
        if count:
            for span in sorted(self.spans.values(), key=lambda span: span.start):
                if span.start - first >= count:
                    break
                first = max(first, span.stop)
        if first + count > len(self.numbers):
            return False
        self.spans[owner] = slice(first, first + count)
        return True

    def free(self, owner: int) -> None:
        """Frees the owner's rows, if any."""
        self.spans.pop(owner, None)

    def remake(self, rows: int, keep: Collection[int]) -> None:
        """Makes a table of `rows` rows: first those of the owners in `keep`, in order; other owners lose theirs."""
        numbers = _rows(rows, self.numbers.shape[1], self.numbers.dtype, self.numbers.device)
        spans: dict[int, slice] = {}
        first = 0
        for owner in keep:
            held = self.spans[owner]
            spans[owner] = slice(first, first + held.stop - held.start)
            numbers[spans[owner]].copy_(self.numbers[held])
            first = spans[owner].stop
        self.numbers, self.spans = numbers, spans


def _rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # else they could not be written outside of inference mode
        return torch.empty(rows, width, dtype=dtype, device=device)
