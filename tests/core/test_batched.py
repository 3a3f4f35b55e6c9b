"""Tokens with pairs of their own equal one adapter at a time: results and gradients, mixes, bare tokens, both ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.base import DenseBase
from lorakeet.core.batched import Stack, shared_low_rank, stacked_in
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.plan import PlanEntry
from lorakeet.core.selection import Share, table_of

IN, OUT, TOKENS = 12, 10, 9
RANKS = {"a": 4, "b": 2, "c": 6}
SHARES = (Share(0, 3, "a"), Share(3, 4, "b"), Share(6, 9, "c", 0.7), Share(6, 8, "a", -0.5))  # 4 and 5 use none, 6 … 8 a mix


def pair(name: str) -> LoraPair:
    rank = RANKS[name]
    entry = PlanEntry(path="w", kind="linear", shape=(OUT, IN), rank=rank, alpha=3.0 * rank)
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


def one_at_a_time(x: Tensor, layer: nn.Linear, pairs: dict[str, LoraPair]) -> Tensor:
    """The definition: every token by itself."""
    rows = []
    for token, row in enumerate(x):
        weight = layer.weight
        for share in SHARES:
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


def stacked(x: Tensor, layer: nn.Linear, stack: Stack) -> Tensor:
    y = DenseBase(layer).matmul(x) + layer.bias
    return stack.add(y, x, table_of(SHARES, stack.layout, stack.A))


def test_a_stack_gives_the_same(layer: nn.Linear, pairs: dict[str, LoraPair]) -> None:
    x = inputs()
    torch.testing.assert_close(stacked(x, layer, Stack(pairs, torch.float32)), one_at_a_time(x, layer, pairs))


def test_a_stack_takes_new_pairs_in_free_places(layer: nn.Linear, pairs: dict[str, LoraPair]) -> None:
    x = inputs()
    stack = Stack({"old": pair("c"), "a": pairs["a"], "c": pairs["c"]}, torch.float32)
    before = stack.A
    assert stack.take(pairs) and stack.A is before, "b, of a smaller rank, takes the place of old"
    torch.testing.assert_close(stacked(x, layer, stack), one_at_a_time(x, layer, pairs))
    assert not stack.take({**pairs, "more": pair("a")}), "no place is free"
    assert not stack.take({"a": pairs["a"]}), "two of three places would be empty"
    assert not Stack({"b": pairs["b"]}, torch.float32).take({"a": pairs["a"]}), "its rank is larger"
    renewed = {**pairs, "a": pair("a")}
    with torch.no_grad():
        renewed["a"].A.mul_(2)
    assert stack.take(renewed), "another pair under the same name is another pair"
    torch.testing.assert_close(stacked(x, layer, stack), one_at_a_time(x, layer, renewed))


def test_bare_tokens_are_the_base_bit_for_bit(layer: nn.Linear, pairs: dict[str, LoraPair]) -> None:
    x, base = inputs(), DenseBase(layer)
    plain = base.matmul(x) + layer.bias
    shares = [(share, pairs[share.name]) for share in SHARES]
    assert torch.equal(shared_low_rank(x, base, shares, bias=layer.bias)[4:6], plain[4:6])
    assert torch.equal(stacked(x, layer, Stack(pairs, torch.float32))[4:6], plain[4:6])


def test_bf16_states_over_fp32_pairs(layer: nn.Linear, pairs: dict[str, LoraPair]) -> None:
    x = inputs().bfloat16().requires_grad_()
    shares = [(share, pairs[share.name]) for share in SHARES]
    y = shared_low_rank(x, DenseBase(layer), shares, bias=layer.bias, products=torch.float32)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, pairs["a"].A.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)  # type: ignore[union-attr]
    torch.testing.assert_close(y.float(), one_at_a_time(x.detach().float(), layer, pairs), rtol=1e-2, atol=1e-2)


def test_a_stack_copies_again_only_what_was_written_to(pairs: dict[str, LoraPair]) -> None:
    stack = Stack(pairs, torch.bfloat16)
    with torch.no_grad():
        pairs["a"].A.zero_()
    stack.A[1] = 7.0  # would be gone if the second pair were copied again
    assert stack.A[0].count_nonzero() > 0
    assert stack.take(pairs)
    assert stack.A[0].count_nonzero() == 0 and bool((stack.A[1] == 7.0).all())
    assert (stack.A.shape, stack.B.shape, stack.A.dtype) == ((3, 6, IN), (3, 6, OUT), torch.bfloat16)


def test_what_is_plain() -> None:
    held = pair("a")
    assert held.plain
    held.dropout = 0.1
    assert held.plain
    assert not held.train().plain


def test_a_stack_of_another_dtype_than_the_states(layer: nn.Linear, pairs: dict[str, LoraPair]) -> None:
    assert stacked_in(torch.bfloat16, torch.device("cpu")) == torch.float32
    assert stacked_in(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    x = inputs().bfloat16()
    stack = Stack(pairs, stacked_in(torch.bfloat16, x.device))
    y = DenseBase(layer).matmul(x.float()).add_(layer.bias).bfloat16()
    found = stack.add(y, x, table_of(SHARES, stack.layout, stack.A))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), one_at_a_time(x.float(), layer, pairs), rtol=2e-2, atol=6e-2)
