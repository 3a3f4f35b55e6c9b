"""Attention of packed rows against the same formulas in double precision; what it promises of rows, threads and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakeet.kernels.cpu import attention
from lorakeet.kernels.cpu.operators import WORKSPACES, loaded
from lorakeet.memory.ledger import Ledger
from tiny.native import needs_native

pytestmark = needs_native

FILLER = 5
CASES = [
    ((5, 1, 9, 3), 0, (6, 2, 64)),
    ((100, 64, 65, 200), 30, (3, 3, 64)),
    ((70, 150, 3), 130, (4, 2, 128)),
    ((20,) * 9, 33, (6, 2, 64)),  # as many rows as groups: heads that share keys go together
    ((300,), 0, (9, 3, 64)),
    ((65, 0, 63), 1, (2, 2, 192)),
]


def states(rows: tuple[int, ...], prefix: int, shape: tuple[int, int, int], seed: int = 0) -> list[Tensor]:
    """q, k, v and ∂O, (tokens, heads, d) in bf16."""
    generator, tokens = torch.Generator().manual_seed(seed), prefix + sum(rows) + FILLER
    heads, kv, d = shape
    return [torch.randn(tokens, each, d, generator=generator).bfloat16() for each in (heads, kv, kv, heads)]


def computed(given: list[Tensor], rows: tuple[int, ...], prefix: int, scale: float) -> list[Tensor]:
    q, k, v, grad = given
    out, logs = attention.ROW_ATTENTION(q, k, v, list(rows), prefix, scale)
    return [out, *attention.ROW_ATTENTION_BACKWARD(grad, q, k, v, out, logs, list(rows), prefix, scale)]


def written_out(given: list[Tensor], rows: tuple[int, ...], prefix: int, scale: float) -> list[Tensor]:
    """The same by softmax over one mask, and autograd, in double precision."""
    q, k, v = (each.double().requires_grad_() for each in given[:3])
    count = prefix + sum(rows)
    row = torch.cat([torch.full((prefix,), -1), torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))])
    seen = ((row[:, None] == row) | (row == -1)) & torch.ones(count, count, dtype=torch.bool).tril()
    group = q.shape[1] // k.shape[1]
    keys, values = (each[:count].repeat_interleave(group, dim=1).transpose(0, 1) for each in (k, v))
    scores = (q[:count].transpose(0, 1) @ keys.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
    out = (scores.softmax(-1) @ values).transpose(0, 1)
    (out * given[3][:count].double()).sum().backward()
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return [torch.cat([out.detach(), torch.zeros(FILLER, *out.shape[1:])]), q.grad, k.grad, v.grad]


@pytest.mark.parametrize(("rows", "prefix", "shape"), CASES)
def test_row_attention_is_attention_written_out(rows: tuple[int, ...], prefix: int, shape: tuple[int, int, int]) -> None:
    given, scale = states(rows, prefix, shape), shape[2] ** -0.5
    for mine, exact in zip(computed(given, rows, prefix, scale), written_out(given, rows, prefix, scale), strict=True):
        assert mine.dtype == torch.bfloat16
        assert not mine[prefix + sum(rows) :].any()  # of tokens that only fill up
        assert float((mine.double() - exact).norm() / exact.norm()) < 4e-3  # bf16 rounds by 2e-3 on average
        assert float((mine.double() - exact).abs().max()) < 2e-2 * float(exact.abs().max())


def test_large_scores_of_one_sign_do_not_overflow() -> None:
    given = [30 * each for each in states((40, 80), 0, (2, 2, 64))]
    found, exact = computed(given, (40, 80), 0, 1.0), written_out(given, (40, 80), 0, 1.0)
    assert all(bool(mine.isfinite().all()) for mine in found)
    for place in (0, 3):  # O and ∂V; nearly all of a softmax is one key, so that ∂Q and ∂K are roundings alone
        assert float((found[place].double() - exact[place]).norm() / exact[place].norm()) < 4e-3


@pytest.mark.parametrize(("rows", "prefix", "shape"), CASES)
def test_threads_change_no_bit(rows: tuple[int, ...], prefix: int, shape: tuple[int, int, int]) -> None:
    given, before = states(rows, prefix, shape), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(computed(given, rows, prefix, 0.1))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_no_number_of_one_row_meets_another_row() -> None:
    rows, shape = (70, 30, 64), (2, 1, 64)
    plain = states(rows, 0, shape)
    spoilt = [each.clone() for each in plain]
    for each in spoilt:
        each[70:100] = float("nan")
        each[164:] = float("inf")
    for good, bad in zip(computed(plain, rows, 0, 0.1), computed(spoilt, rows, 0, 0.1), strict=True):
        assert torch.equal(good[:70], bad[:70]) and torch.equal(good[100:164], bad[100:164])
        assert bool(bad[70:100].isnan().any()) and not bad[164:].any()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def attention_and_gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    return computed([q, k, v, grad], (9, 4), 3, 0.1)


def test_shapes_alone_give_what_numbers_give() -> None:
    mode, given = FakeTensorMode(), states((9, 4), 3, (4, 2, 64))
    with mode:
        planned = attention_and_gradients(*(mode.from_tensor(each) for each in given))
    for shape, real in zip(planned, attention_and_gradients(*(each.clone() for each in given)), strict=True):
        assert (shape.shape, shape.dtype, shape.stride()) == (real.shape, real.dtype, real.stride())


def test_a_ledger_counts_the_flops_of_scores_that_count_and_the_kernel_s_workspace() -> None:
    rows, prefix, (heads, kv, d) = (9, 4), 3, (4, 2, 64)
    ledger = Ledger()
    with ledger, ledger.phase("attention"):
        given = [torch.empty(16, each, d, dtype=torch.bfloat16) for each in (heads, kv, kv, heads)]
        computed(given, rows, prefix, 0.1)
    scores = 12 * 13 // 2 + 4 * 5 // 2 + 4 * prefix
    assert ledger.work["attention"].flops == 7 * 2 * scores * d * heads
    q, k, v, grad = given
    work = WORKSPACES[attention.ROW_ATTENTION_BACKWARD](grad, q, k, v, q, q, list(rows), prefix, 0.1)
    given_and_found = 2 * sum(2 * each.numel() for each in given) + 4 * heads * len(q)  # as many of both, and the logs
    assert ledger.peaks["attention"].bytes == work + given_and_found


@pytest.mark.parametrize("rows", [[64], [-1, 9], [10, 7]])
def test_rows_that_are_not_there_are_refused(rows: list[int]) -> None:
    q = numbers(16, 2, 64)
    with pytest.raises(ValueError, match=r"do not fit|must have"):
        attention.ROW_ATTENTION(q, q, q, rows, 0, 1.0)


def test_values_of_fewer_tokens_than_keys_are_refused() -> None:
    q = numbers(16, 2, 64)
    with pytest.raises(ValueError, match=r"do not fit|must have"):
        attention.ROW_ATTENTION(q, q, q[:8], [16], 0, 1.0)


@pytest.mark.parametrize(("prefix", "kv", "groups"), [(33, 2, 8), (64, 2, 5), (300, 1, 2)])
def test_groups_of_rows_change_a_prefix_s_gradient_by_rounding_alone(
    monkeypatch: pytest.MonkeyPatch, prefix: int, kv: int, groups: int
) -> None:
    rows = 9, 30, 4, 70, 1, 22, 8, 13, 40
    given, shape = states(rows, prefix, (4, kv, 64)), (prefix + sum(rows), 4, kv, 64)
    assert attention.attention_shape(rows, prefix, 0.1, shape).groups == groups
    grouped = computed(given, rows, prefix, 0.1)
    monkeypatch.setattr(attention, "GROUPS", 1)
    assert attention.attention_shape(rows, prefix, 0.1, shape).groups == 1
    for one, other in zip(grouped, computed(given, rows, prefix, 0.1), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("heads", "kv"), [(32, 32), (32, 8), (9, 3), (8, 1)])
@pytest.mark.parametrize(("prefix", "rows"), [(1500, (60,) * 9), (30, (10,) * 200), (2000, (24, 24)), (5, (100,) * 20)])
def test_a_prefix_stays_within_a_plan_without_one(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv: int, prefix: int, rows: tuple[int, ...]
) -> None:
    """What is allocated, seen as it is, beside what a plan counts for rows of as many tokens that share nothing."""
    tokens, held = prefix + sum(rows), [0]
    q, k = (torch.zeros(tokens, count, 64, dtype=torch.bfloat16) for count in (heads, kv))
    planned = WORKSPACES[attention.ROW_ATTENTION_BACKWARD](q, q, k, k, q, q, [*rows[1:], rows[0] + prefix], 0, 0.1)
    usual = torch.empty

    def empty(*sizes: int, **settings: Any) -> torch.Tensor:
        held[0] += (found := usual(*sizes, **settings)).nbytes
        return found

    idle = _Idle(loaded())
    monkeypatch.setattr(attention, "loaded", lambda: idle)
    monkeypatch.setattr(torch, "empty", empty)
    attention.row_attention_backward(q, q, k, k, q, usual(heads, tokens), list(rows), prefix, 0.1)
    assert 0 < held[0] <= planned


class _Idle:
    """The library, whose attention backward computes nothing."""

    def __init__(self, library: Any) -> None:
        self.attention_scratch, self.attention_backward = library.attention_scratch, lambda *_: None
