"""Tokens with pairs of their own equal one adapter at a time: results and gradients, mixes, bare tokens, both ways."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.base import DenseBase
from lorakeet.core.batched import stack as stacks
from lorakeet.core.batched.stack import PairStack, row_dots, shared_low_rank
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import PlanEntry
from lorakeet.core.selection import PATIENCE, BatchAssignment, Selection, Share
from lorakeet.kernels.device import standing_for

IN, OUT, TOKENS = 12, 10, 9
RANKS = {"a": 4, "b": 2, "c": 6}
SHARES = (Share(0, 3, "a"), Share(3, 4, "b"), Share(6, 9, "c", 0.7), Share(6, 8, "a", -0.5))  # 4 and 5 use none, 6 … 8 a mix


def pair(name: str, out: int = OUT) -> LoraPair:
    rank = RANKS[name]
    entry = PlanEntry(path="w", kind="linear", shape=(out, IN), rank=rank, alpha=3.0 * rank)
    made = LoraPair(entry).eval()
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        made.A.normal_(generator=generator)
        made.B.normal_(generator=generator)
    return made


@pytest.fixture
def pairs() -> dict[str, LoraPair]:
    return {name: pair(name) for name in RANKS}


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT).requires_grad_(False)


def one_at_a_time(x: Tensor, layer: nn.Linear, pairs: dict[str, LoraPair], shares: Sequence[Share] = SHARES) -> Tensor:
    """The definition: every token by itself."""
    rows = []
    for token, row in enumerate(x):
        weight = layer.weight
        for share in shares:
            if share.start <= token < share.stop:
                held = pairs[share.name]
                weight = weight + share.weight * held.scale * (held.B @ held.A)
        rows.append(row @ weight.T + layer.bias)
    return torch.stack(rows)


def inputs() -> Tensor:
    return torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(1))


def test_equals_one_token_at_a_time_with_gradients(layer: nn.Linear, pairs: dict[str, LoraPair]) -> None:
    found = []
    for ours in (True, False):
        x = inputs().requires_grad_()
        for held in pairs.values():
            held.zero_grad()
        if ours:
            shares = [(share, pairs[share.name]) for share in SHARES]
            y = shared_low_rank(x, DenseBase(layer), shares, bias=layer.bias)
        else:
            y = one_at_a_time(x, layer, pairs)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad.clone() for held in pairs.values() for p in (held.A, held.B))])  # type: ignore[union-attr]
    for ours_value, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours_value, expected, rtol=1e-4, atol=1e-4)


CPU = torch.device("cpu")


def arrangement(*shares: Share, units: int = TOKENS, selection: Selection | None = None) -> BatchAssignment:
    selection = selection or Selection()
    selection.divide(shares or SHARES, units=units)
    return selection.assignment(units, CPU)


def stack_of(
    pairs: dict[str, LoraPair], to: BatchAssignment, dtype: torch.dtype = torch.float32, selection: Selection | None = None
) -> PairStack:
    stack = PairStack([(OUT, IN)], dtype, CPU)
    stack.hold(to, [pairs], selection or Selection())
    return stack


def stacked(x: Tensor, layer: nn.Linear, stack: PairStack, to: BatchAssignment) -> Tensor:
    y = DenseBase(layer).matmul(x) + layer.bias
    stack.add([y], x, to)
    return y


@pytest.mark.parametrize(
    "shares",
    [
        [Share(token, token + 1, "abc"[token % 3], 1.0 + token // 3) for token in range(TOKENS)],  # a mix for each token
        [Share(0, TOKENS, "a")],
        [Share(token, token + 1, "ab"[token % 2]) for token in range(TOKENS)],  # few mixes, many tokens
        [Share(0, 4, "a"), Share(5, 6, "b"), Share(6, 7, "c"), Share(7, 8, "a", 0.5)],  # tokens without one between them
    ],
)
@pytest.mark.parametrize("few", [16, 3, 1])
@pytest.mark.parametrize("own_kernel", [True, False], ids=["torch's kernel", "gathered"])
def test_each_way_through_a_stack_gives_the_same(
    shares: list[Share],
    few: int,
    own_kernel: bool,
    layer: nn.Linear,
    pairs: dict[str, LoraPair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorakeet.core.selection.FEW", few)  # beyond it, tokens of one mix are multiplied by themselves
    monkeypatch.setattr("lorakeet.core.batched.stack._adds_up_well", lambda dtype: own_kernel)
    x, to = inputs(), arrangement(*shares)
    torch.testing.assert_close(stacked(x, layer, stack_of(pairs, to), to), one_at_a_time(x, layer, pairs, shares))


@pytest.mark.parametrize("outs", [(OUT, OUT, OUT), (OUT, 6, 6), (6, OUT, 6)], ids=["alike", "two alike", "each its own"])
def test_layers_that_see_the_same_x_share_a_stack(outs: tuple[int, ...], pairs: dict[str, LoraPair]) -> None:
    """As each by itself does, whether the B's of neighbours stand in one table or not."""
    to, x = arrangement(), inputs()
    short = {name: pair(name, out=6) for name in pairs}
    others = {name: held for name, held in short.items() if name != "b"}  # b has no pair on some layer
    layers = [pairs if out == OUT else others if 6 in outs[:place] else short for place, out in enumerate(outs)]
    if outs[1] == OUT:
        layers[1] = {}  # and nobody has one there
    together = PairStack([(out, IN) for out in outs], torch.float32, CPU)
    assert len(together._Bs) == len({*outs}) + (outs[0] == outs[2] != outs[1])
    together.hold(to, layers, Selection())
    found = [torch.zeros(TOKENS, out) for out in outs]
    together.add(found, x, to)
    for y, held, out in zip(found, layers, outs, strict=True):
        alone = torch.zeros(TOKENS, out)
        stack = PairStack([(out, IN)], torch.float32, CPU)
        stack.hold(to, [held], Selection())
        stack.add([alone], x, to)
        torch.testing.assert_close(y, alone)
        assert bool(y.any()) == bool(held)


def test_a_b_that_is_kept_in_bf16_is_not_rounded_again_where_products_are_in_fp32(pairs: dict[str, LoraPair]) -> None:
    held = {name: one.to(torch.bfloat16) for name, one in pairs.items()}
    to, x, y = arrangement(Share(0, 1, "a", 0.3)), inputs(), torch.zeros(TOKENS, OUT)
    stack_of(held, to).add([y], x, to)
    A, B = (factor.detach().float() for factor in held["a"].factors())
    torch.testing.assert_close(y[0], 0.3 * held["a"].scale * x[0] @ A.T @ B.T, rtol=1e-5, atol=1e-5)


def copies(stack: PairStack, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places that are copied to from now on."""
    found: list[int] = []
    copy = stack._copy
    monkeypatch.setattr(stack, "_copy", lambda place, mix: (found.append(place), copy(place, mix)))
    return found


def test_a_stack_copies_what_is_new(pairs: dict[str, LoraPair], monkeypatch: pytest.MonkeyPatch) -> None:
    selection, x = Selection(), inputs()
    held = {**pairs, "d": pair("b")}
    for name in held:
        selection.changed(name)

    def at(names: str) -> BatchAssignment:
        return arrangement(*(Share(i, i + 1, name) for i, name in enumerate(names)), selection=selection)

    to = at("abc")
    stack = stack_of(held, to, selection=selection)
    copied = copies(stack, monkeypatch)

    def now() -> list[int]:
        copied.clear()
        stack.hold(to, [held], selection)
        return copied

    assert now() == []
    to = at("adc")
    assert now() == [1], "d takes the place of b"
    y = torch.zeros(TOKENS, OUT)
    stack.add([y], x, to)
    torch.testing.assert_close(y[1], held["d"].scale * x[1] @ held["d"].A.T @ held["d"].B.T)
    with torch.no_grad():
        held["c"].A.mul_(2)
    assert now() == [2], "it was written to"
    held["a"] = pair("a")
    selection.changed("a")
    assert now() == [0], "another pair under the same name"
    selection.changed("e")
    assert now() == [], "what comes for others is nothing to these"
    del held["c"]
    selection.changed("c", gone=True)
    assert now() == [2] and stack._ranks[2] == (0,), "c has gone"
    held["c"] = pair("c")
    selection.changed("c")
    to = at("ab")
    assert now() == [1], "b is back at the place of d; c's place is left alone as long as nobody asks for it"
    to = at("abc")
    assert now() == [2]


def test_a_copying_that_fails_leaves_nothing_that_looks_like_a_copy(
    pairs: dict[str, LoraPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {**pairs, "d": pair("b")}
    first, second = (arrangement(*(Share(i, i + 1, name) for i, name in enumerate(names))) for names in ("abc", "dca"))
    stack = stack_of(held, first)
    copy = stack._copy

    def failing(place: int, mix: Any) -> None:
        copy(place, mix)
        if place == 1:
            raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(stack, "_copy", failing)
        stack.hold(second, [held], Selection())
    stack.hold(first, [held], Selection())
    y, x = torch.zeros(TOKENS, OUT), inputs()
    stack.add([y], x, first)
    torch.testing.assert_close(y[0], held["a"].scale * x[0] @ held["a"].A.T @ held["a"].B.T)


def rows_of(*names: str, **weights: float) -> list[Share]:
    """A text of one token for each name, and one for a mix of `weights`."""
    single = [Share(number, number + 1, name) for number, name in enumerate(names)]
    return single + [Share(len(names), len(names) + 1, name, weight) for name, weight in weights.items()]


def test_tables_have_the_rows_that_are_needed_and_no_more() -> None:
    RANKS["wide"] = 64
    held = {"wide": pair("wide"), **{f"n{number}": pair("b") for number in range(15)}}
    del RANKS["wide"]
    stack, selection = PairStack([(OUT, IN)], torch.bfloat16, CPU), Selection()
    row = 2 * (IN + OUT)  # bytes

    def hold(shares: list[Share]) -> int:
        stack.hold(arrangement(*shares, units=20, selection=selection), [held], selection)
        return stack.bytes // row

    assert hold(rows_of(*held)) == 64 + 15 * 2, "nothing is filled up to the largest rank or to a power of two"
    assert hold(rows_of("wide", n0=0.1, n1=0.2)) == 94
    small = (f"n{number}" for number in range(15))
    assert hold(rows_of(*small, wide=0.1, n0=0.3)) == 30 + 66, "a mix has the ranks of its adapters"


@pytest.mark.parametrize("seed", range(4))
def test_places_of_unequal_ranks_come_and_go_and_all_rows_are_right(
    seed: int, layer: nn.Linear, pairs: dict[str, LoraPair]
) -> None:
    random = Random(seed)
    selection, stack, x, most = Selection(), PairStack([(OUT, IN), (OUT, IN)], torch.float32, CPU), inputs(), 0
    others = {name: held for name, held in pairs.items() if name != "b"}
    for _ in range(150):
        shares = [
            Share(token, token + 1, name, random.choice((1.0, 0.5)))
            for token in range(random.randint(0, TOKENS))
            for name in random.sample("abc", random.randint(0, 3))
        ]
        to = arrangement(*shares, selection=selection) if shares else None
        if to is None:
            continue
        stack.hold(to, [pairs, others], selection)
        found = [torch.zeros(TOKENS, OUT) for _ in range(2)]
        stack.add(found, x, to)
        for y, held in zip(found, (pairs, others), strict=True):
            own = [share for share in shares if share.name in held]
            expected = one_at_a_time(x, layer, held, own) - one_at_a_time(x, layer, held, ())
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        most = max(most, sum(sum(stack._ranks[place]) for place in to.used))
        assert len(stack._A.numbers) <= most


def test_a_stack_shrinks_when_many_batches_needed_less_and_not_for_one(
    pairs: dict[str, LoraPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    selection, stack = Selection(), PairStack([(OUT, IN)], torch.float32, CPU)
    selection.register(stack)
    many = {**{f"n{number}": pair("b") for number in range(8)}, "probed": pair("b")}
    texts, alone = rows_of(*(f"n{number}" for number in range(8))), rows_of("probed")

    def hold(shares: list[Share]) -> None:
        stack.hold(arrangement(*shares, selection=selection), [many], selection)

    hold(texts)
    full, copied = stack.bytes, copies(stack, monkeypatch)
    hold(alone)
    hold(texts)
    assert len(copied) == 2, "what is probed takes the place of one, which comes back"
    for _ in range(PATIENCE + 1):
        hold(alone)
    assert stack.bytes == full // 8 == selection.table_bytes
    hold(texts)
    assert stack.bytes == full
    before = selection.changes
    selection.release()
    assert stack.bytes == selection.table_bytes == 0 and stack.empty and selection.changes != before


def test_bare_tokens_are_the_base_bit_for_bit(layer: nn.Linear, pairs: dict[str, LoraPair]) -> None:
    x, base = inputs(), DenseBase(layer)
    plain = base.matmul(x) + layer.bias
    shares = [(share, pairs[share.name]) for share in SHARES]
    assert torch.equal(shared_low_rank(x, base, shares, bias=layer.bias)[4:6], plain[4:6])
    to = arrangement()
    assert torch.equal(stacked(x, layer, stack_of(pairs, to), to)[4:6], plain[4:6])


def test_bf16_states_over_fp32_pairs(layer: nn.Linear, pairs: dict[str, LoraPair]) -> None:
    x = inputs().bfloat16().requires_grad_()
    shares = [(share, pairs[share.name]) for share in SHARES]
    y = shared_low_rank(x, DenseBase(layer), shares, bias=layer.bias, products=torch.float32)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, pairs["a"].A.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)  # type: ignore[union-attr]
    torch.testing.assert_close(y.float(), one_at_a_time(x.detach().float(), layer, pairs), rtol=1e-2, atol=1e-2)


def test_a_stack_of_bf16_copies(layer: nn.Linear, pairs: dict[str, LoraPair]) -> None:
    """A, B and x·Aᵀ are rounded, each sum is in fp32: as near to the exact result as the way of one adapter for all tokens."""
    x, to = inputs().bfloat16(), arrangement()
    layer.weight.zero_()
    layer.bias.zero_()
    stack = stack_of(pairs, to, torch.bfloat16)
    assert stack._A.numbers.dtype == stack._Bs[0].numbers.dtype == torch.bfloat16
    y = torch.zeros(TOKENS, OUT, dtype=torch.bfloat16)
    stack.add([y], x, to)
    shares = [(share, pairs[share.name]) for share in SHARES]
    with torch.no_grad():
        other = shared_low_rank(x, DenseBase(layer.bfloat16()), shares)
        exact = one_at_a_time(x.float(), layer.float(), pairs)
        errors = [float((found.float() - exact).norm() / exact.norm()) for found in (y, other)]
    assert errors[0] < 5e-3 and errors[0] < 1.5 * errors[1]


ROWS, WIDTH = 7, 200
TAKEN = torch.tensor([0, 0, 2, 2, 2, 1])
PICKED = torch.tensor([6, 0, 3, 3, 1, 5])


def numbers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_dots(dtype: torch.dtype) -> None:
    x, table = numbers(3, WIDTH, seed=0, dtype=dtype), numbers(ROWS, WIDTH, seed=1, dtype=dtype)
    expected = (x[TAKEN].double() * table[PICKED].double()).sum(1).to(dtype)
    found = [row_dots(x, TAKEN, table, PICKED)]
    with standing_for(torch.device("cuda")):
        found.append(row_dots(x, TAKEN, table, PICKED))
    for one in found:
        torch.testing.assert_close(one, expected)


def test_a_kernel_that_rounds_each_sum_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stacks._adds_up_well(torch.float32)

    def rounding(x: Tensor, table: Tensor, rows: Tensor, _: Tensor, tokens: Tensor, __: int) -> Tensor:
        return (x[tokens] * table[rows]).cumsum(1)[:, -1]  # as wide as its numbers

    class Ops:
        _embedding_bag_per_sample_weights_backward = staticmethod(rounding)

    stacks._adds_up_well.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(torch.ops, "aten", Ops)
            assert stacks._adds_up_well(torch.float32)
            Ops._embedding_bag_per_sample_weights_backward = staticmethod(  # type: ignore[method-assign]
                lambda x, table, rows, _, tokens, __: _one_by_one(x[tokens] * table[rows])
            )
            stacks._adds_up_well.cache_clear()
            assert not stacks._adds_up_well(torch.bfloat16)
    finally:
        stacks._adds_up_well.cache_clear()


def _one_by_one(products: Tensor) -> Tensor:
    """Sums that are rounded to the dtype of the products after each number."""
    total = products[:, 0].clone()
    for column in products.unbind(1)[1:]:
        total += column
    return total
