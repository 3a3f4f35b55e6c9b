"""Both ways of computing row attention against attention written out in double precision; what they keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.core.fused import packed_attention
from lorakeet.core.fused.packed_attention import KEPT_KEYS, causal_rows

HEADS, KV, WIDTH = 6, 2, 8
ROWS = (5, 1, 9, 3)
SCALE = 0.3


def states(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, sum(ROWS), WIDTH).to(dtype).requires_grad_() for heads in (HEADS, KV, KV)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("queries", [2, 4, 256])
def test_a_prefix_that_rows_share_counts_for_each_of_them(
    dtype: torch.dtype, tolerance: float, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against rows that each carry the prefix: equal outputs, and the prefix's gradient is the sum over the rows."""
    monkeypatch.setattr(packed_attention, "QUERIES", queries)
    prefix, rows, filler = 3, (2, 6, 1, 5), 4
    apart = [list(range(prefix)) + list(range(prefix + sum(rows[:i]), prefix + sum(rows[: i + 1]))) for i in range(len(rows))]
    tokens = prefix + sum(rows) + filler
    torch.manual_seed(0)
    given = [torch.randn(1, heads, tokens, WIDTH).to(dtype).requires_grad_() for heads in (HEADS, KV, KV)]
    weights = torch.randn(1, tokens, HEADS, WIDTH)
    out = causal_rows(*given, rows, SCALE, dtype, prefix)
    assert out.is_contiguous()  # as torch's own attentions give it: some models view it
    assert not out[:, -filler:].any()
    (out.float() * weights).sum().backward()
    found = [out.detach(), *(states.grad for states in given)]
    exact = [states.detach().double().requires_grad_() for states in given]
    expected = torch.zeros(1, tokens, HEADS, WIDTH, dtype=torch.float64)
    for number, places in enumerate(apart):
        q, k, v = (states[:, :, places] for states in exact)
        k, v = (states.repeat_interleave(HEADS // KV, dim=1) for states in (k, v))
        own = slice(prefix if number else 0, None)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE).transpose(1, 2)
        expected = expected.index_add(1, torch.tensor(places[own]), attended[:, own])
    (expected * weights).sum().backward()
    for ours, theirs in zip(found, [expected.detach(), *(states.grad for states in exact)], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def literal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(mask(scale·q·kᵀ))·v with one mask over all tokens."""
    k, v = (x.repeat_interleave(HEADS // KV, dim=1) for x in (k, v))
    row = torch.repeat_interleave(torch.arange(len(ROWS)), torch.tensor(ROWS))
    seen = (row[:, None] == row) & torch.ones(len(row), len(row), dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2) * SCALE).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def outputs_and_gradients(dtype: torch.dtype, products: torch.dtype | None) -> list[Tensor]:
    q, k, v = states(dtype)
    weights = torch.randn(1, sum(ROWS), HEADS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    if products is None:
        out = literal(q.double(), k.double(), v.double())
    else:
        out = causal_rows(q, k, v, ROWS, SCALE, products)
        assert out.dtype == dtype
    (out * weights).sum().backward()
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize(
    ("dtype", "products", "tolerance"),
    [(torch.float32, torch.float32, 1e-5), (torch.bfloat16, torch.float32, 3e-2), (torch.bfloat16, torch.bfloat16, 3e-2)],
)
def test_equals_attention_written_out(dtype: torch.dtype, products: torch.dtype, tolerance: float) -> None:
    for found, expected in zip(outputs_and_gradients(dtype, products), outputs_and_gradients(dtype, None), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("queries", [2, 4])
def test_blocks_of_queries_change_nothing_but_rounding(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = outputs_and_gradients(torch.bfloat16, torch.bfloat16)
    monkeypatch.setattr(packed_attention, "QUERIES", queries)
    for found, expected in zip(outputs_and_gradients(torch.bfloat16, torch.bfloat16), whole, strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_products_see_few_shapes_whatever_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: set[tuple[int, ...]] = set()
    usual = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: shapes.add((*a.shape, *b.shape)) or usual(a, b))  # type: ignore[func-returns-value]
    for length in range(33, 65):  # every length of one piece
        q, k, v = (torch.randn(1, heads, length, WIDTH).bfloat16().requires_grad_() for heads in (HEADS, KV, KV))
        causal_rows(q, k, v, (length,), SCALE, torch.bfloat16).sum().backward()
    assert len(shapes) == 3  # P·V and ∂S·K, ∂O·Vᵀ, Pᵀ·∂O and ∂Sᵀ·Q


@pytest.mark.parametrize(("row", "weights"), [(KEPT_KEYS, True), (KEPT_KEYS + 1, False)])
def test_products_keep_what_came_in_and_the_weights_of_short_rows(row: int, weights: bool) -> None:
    kept: list[Tensor] = []
    q, k, v = (torch.randn(1, heads, row, 8, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        causal_rows(q, k, v, (row,), SCALE, torch.bfloat16)
    others = [x for x in kept if x.data_ptr() not in {states.data_ptr() for states in (q, k, v)}]
    assert len(kept) - len(others) == 3 and len(others) == weights
    assert sum(x.numel() for x in others) == (q.shape[1] * row * row if weights else 0)


def test_fp32_states_are_never_rounded_to_narrow_products() -> None:
    exact = outputs_and_gradients(torch.float32, None)
    for found, expected in zip(outputs_and_gradients(torch.float32, torch.bfloat16), exact, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


LAYOUTS = [((33, 40, 64, 7, 1, 300), 0), ((10, 2, 600, 33), 100), ((32, 32, 32), 0), ((50,), 0)]


@pytest.mark.parametrize(("rows", "prefix"), LAYOUTS)
@pytest.mark.parametrize("tokens", [64, 4096])
def test_rows_of_many_lengths_are_each_attended_alone(
    rows: tuple[int, ...], prefix: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several calls of the flash kernel, and one: against each row by itself in double precision."""
    monkeypatch.setattr(packed_attention, "TOKENS", tokens)
    torch.manual_seed(0)
    total = prefix + sum(rows)
    given = [torch.randn(1, heads, total, WIDTH).requires_grad_() for heads in (HEADS, KV, KV)]
    weights = torch.randn(1, total, HEADS, WIDTH)
    out = causal_rows(*given, rows, SCALE, torch.float32, prefix)
    (out * weights).sum().backward()
    exact = [states.detach().double().requires_grad_() for states in given]
    expected, start = torch.zeros(1, total, HEADS, WIDTH, dtype=torch.float64), prefix
    for number, length in enumerate(rows):
        places = [*range(prefix), *range(start, start + length)]
        start += length
        q, k, v = (states[:, :, places] for states in exact)
        k, v = (states.repeat_interleave(HEADS // KV, dim=1) for states in (k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE).transpose(1, 2)
        own = slice(prefix if number else 0, None)
        expected = expected.index_add(1, torch.tensor(places[own]), attended[:, own])
    (expected * weights).sum().backward()
    pairs = zip([out, *(states.grad for states in given)], [expected, *(states.grad for states in exact)], strict=True)
    for found, wanted in pairs:
        assert found is not None and wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [0, 1])
def test_what_is_not_finite_in_one_row_stays_there(dtype: torch.dtype, bad: int) -> None:
    """A member of a many-adapter run that diverges must not take the others with it."""
    rows = (30, 20)
    torch.manual_seed(0)
    given = [torch.randn(1, heads, sum(rows), WIDTH).to(dtype) for heads in (HEADS, KV, KV)]
    broken, whole = (slice(0, 30), slice(30, 50)) if bad == 0 else (slice(30, 50), slice(0, 30))
    for states in given:
        states[:, :, broken] = float("nan")
        states.requires_grad_()
    out = causal_rows(*given, rows, SCALE, dtype)
    out.sum().backward()
    assert torch.isfinite(out[:, whole]).all()
    assert all(states.grad is not None and torch.isfinite(states.grad[:, :, whole]).all() for states in given)
