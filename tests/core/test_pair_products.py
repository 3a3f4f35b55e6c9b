"""Parts of pairs by torch's products and by kernels/cpu against autograd through the formula."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from lorakeet.core.pair_products import PairProducts, PairSpan
from lorakeet.kernels.cpu import operators
from lorakeet.kernels.cpu.compile import why_not

NATIVE = pytest.param(True, marks=pytest.mark.skipif(bool(why_not()), reason=why_not() or "the library is there"))
PLACES = [PairSpan(0, 20, 2.0), PairSpan(0, 20, 0.5, 1), PairSpan(20, 33, 1.0, 1), PairSpan(40, 50, 3.0)]
WIDTH, OUTPUTS, TOKENS = 64, (32, 96), 50


def case(dtype: torch.dtype, places: list[PairSpan]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """x, y's, their gradients, and A and B of each pair, in fp32, all to be read in `dtype`."""
    torch.manual_seed(3)
    x = torch.randn(TOKENS, WIDTH).to(dtype)
    ys, grads = ([torch.randn(TOKENS, out).to(dtype) for out in OUTPUTS] for _ in range(2))
    factors = [
        factor
        for number, place in enumerate(places)
        for factor in (torch.randn(3 + number, WIDTH) / 8, torch.randn(OUTPUTS[place.layer], 3 + number))
    ]
    return x, ys, grads, [factor.to(dtype).float() for factor in factors]


def by_autograd(
    x: Tensor, ys: list[Tensor], grads: list[Tensor], factors: list[Tensor], places: list[PairSpan]
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """y's, ∂x and ∂A, ∂B by turns, in fp64."""
    leaf, own = x.double().requires_grad_(), [factor.double().requires_grad_() for factor in factors]
    found = [y.double() for y in ys]
    for place, A, B in zip(places, own[::2], own[1::2], strict=True):
        more = torch.zeros_like(found[place.layer])
        more[place.rows] = place.scale * leaf[place.rows] @ A.t() @ B.t()
        found[place.layer] = found[place.layer] + more
    of_x, *of_factors = torch.autograd.grad(found, [leaf, *own], [grad.double() for grad in grads])
    return found, of_x, list(of_factors)


@pytest.mark.parametrize(("native", "dtype"), [(False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)])
@pytest.mark.parametrize("overlapping", [False, True])
def test_products_and_gradients(native: bool, dtype: torch.dtype, overlapping: bool) -> None:
    if native and why_not():
        pytest.skip(why_not())
    places = [*PLACES, PairSpan(10, 45, 1.5)] if overlapping else PLACES
    x, ys, grads, factors = case(dtype, places)
    expected_ys, expected_x, expected = by_autograd(x, ys, grads, factors, places)
    pairs, grad_x = PairProducts(places, dtype), torch.zeros_like(x)
    with nullcontext() if native else operators.torch_only():
        shrunk = pairs.add(ys, x, factors)
        through, of_b = pairs.backward(grad_x, grads, shrunk, factors)
        of_a = pairs.of_a(through, x, factors)
    assert (pairs.kernel is not None) == (native and not overlapping)  # C wants rows of one part each
    bound = 1e-5 if dtype == torch.float32 else 0.015
    everything = [*expected_ys, expected_x, *expected[::2], *expected[1::2]]
    for found, wanted in zip([*ys, grad_x, *of_a, *of_b], everything, strict=True):
        assert (found.double() - wanted).norm() <= bound * wanted.norm()
    assert all(grad.dtype == torch.float32 for grad in (*of_a, *of_b))


@pytest.mark.parametrize("native", [False, NATIVE])
def test_the_other_gradients_are_the_same_without_that_of_x(native: bool) -> None:
    x, ys, grads, factors = case(torch.bfloat16, PLACES)
    pairs, to = PairProducts(PLACES, torch.bfloat16), torch.zeros_like(x)
    with nullcontext() if native else operators.torch_only():
        shrunk = pairs.add(ys, x, factors)
        without, of_b = pairs.backward(None, grads, shrunk, factors)
        with_x, same = pairs.backward(to, grads, shrunk, factors)
    assert all(map(torch.equal, (*without, *of_b), (*with_x, *same)))
    assert to[33:40].eq(0).all()
    assert to[:33].ne(0).any()


@pytest.mark.parametrize("native", [False, NATIVE])
def test_a_pair_without_terms_adds_nothing(native: bool) -> None:
    """As pruning leaves it."""
    x, ys, grads, factors = case(torch.bfloat16, PLACES)
    factors[0], factors[1], before = factors[0][:0], factors[1][:, :0], ys[0][:20].clone()
    pairs = PairProducts(PLACES, torch.bfloat16)
    with nullcontext() if native else operators.torch_only():
        through, of_b = pairs.backward(torch.zeros_like(x), grads, pairs.add(ys, x, factors), factors)
        of_a = pairs.of_a(through, x, factors)
    assert torch.equal(ys[0][:20], before)
    assert [of_a[0].shape, of_b[0].shape] == [(0, WIDTH), (OUTPUTS[0], 0)]
    assert of_b[1].ne(0).any()


def test_neighbours_on_the_same_rows_are_a_part() -> None:
    pairs = PairProducts(PLACES, torch.float32)
    assert pairs.parts == [(slice(0, 20), [0, 1]), (slice(20, 33), [2]), (slice(40, 50), [3])]


def test_no_pairs_are_no_products() -> None:
    pairs = PairProducts([], torch.float32)
    x = torch.randn(3, 4)
    assert pairs.add([x], x, []) == ()
    assert pairs.backward(x, [x], (), []) == ((), [])
    assert pairs.of_a((), x, []) == []
