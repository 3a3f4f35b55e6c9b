"""Products with a dense frozen weight: torch's to rounding, each row the same bits whatever stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakeet.core.base import DenseBase, TransposedBase, frozen_product, sum_of_matmul_t
from lorakeet.kernels import choose
from lorakeet.kernels.cpu import compile, dense, operators
from lorakeet.memory.ledger import Ledger
from tiny.native import needs_native

pytestmark = needs_native
SHAPES = [  # tokens, out and in: whole and broken panels of 48, pieces of 192 to 384 tokens, sums of more than 2,048 terms
    (1, 16, 16), (7, 48, 16), (8, 64, 32), (9, 96, 48), (193, 80, 592), (250, 576, 208), (20, 2064, 4112), (11, 16, 6000),
    (0, 32, 16), (1800, 96, 64), (700, 48, 2096), (290, 16, 32),
]  # fmt: skip
ROUNDED = 2.0**-8  # half a step of bf16, of a number


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a processor with AMX, which multiplies by that."""
    monkeypatch.setattr(dense, "multiplies", lambda: True)
    monkeypatch.setattr(choose, "CANDIDATES", {})


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(x: Tensor, weight: Tensor, across: bool) -> Tensor:
    return x.double() @ (weight.double() if across else weight.double().t())


@pytest.mark.parametrize(("tokens", "out", "width"), SHAPES)
def test_products_are_rounded_once(tokens: int, out: int, width: int) -> None:
    weight = drawn(out, width, seed=1)
    for across in (False, True):
        x = drawn(tokens, out if across else width)
        wanted = exact(x, weight, across)
        terms = exact(x.abs(), weight.abs(), across)  # what sums in fp32 may lose grows with these
        found = dense.DENSE_PRODUCT(x, weight, across)
        assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
        assert ((found.double() - wanted).abs() <= ROUNDED * wanted.abs() + 1e-5 * terms).all()
        before = drawn(*found.shape, seed=2)
        to = before.clone()
        dense.DENSE_PRODUCT_ADD(to, x, weight, across)
        summed = before.double() + wanted
        assert ((to.double() - summed).abs() <= ROUNDED * summed.abs() + 1e-5 * terms).all()


@pytest.mark.parametrize("across", [False, True])
def test_a_row_s_bits_know_neither_its_neighbours_nor_the_threads(across: bool) -> None:
    weight, x = drawn(4112, 4112, seed=1), drawn(203, 4112)
    whole, threads = dense.DENSE_PRODUCT(x, weight, across), torch.get_num_threads()
    for first, last in ((0, 1), (5, 12), (190, 203)):
        assert torch.equal(dense.DENSE_PRODUCT(x[first:last].contiguous(), weight, across), whole[first:last])
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(dense.DENSE_PRODUCT(x, weight, across), whole)
    finally:
        torch.set_num_threads(threads)


def test_what_is_no_number_stays_in_its_row_and_column() -> None:
    x, weight = drawn(12, 32), drawn(96, 32, seed=1)
    alone = dense.DENSE_PRODUCT(x, weight, False)
    x[3, 7], weight[50, 2] = torch.inf, torch.nan
    found = dense.DENSE_PRODUCT(x, weight, False)
    assert not found[3].isfinite().any() and found[:, 50].isnan().all()
    rows, columns = torch.arange(12) != 3, torch.arange(96) != 50
    assert torch.equal(found[rows][:, columns], alone[rows][:, columns])


def test_bases_multiply_so_where_the_operators_serve() -> None:
    layer, x, grad = nn.Linear(32, 48, bias=False), drawn(5, 32), drawn(5, 48)
    layer.weight = nn.Parameter(drawn(48, 32, seed=1), requires_grad=False)
    turned = nn.Linear(48, 32, bias=False)
    turned.weight = nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)
    base, same = DenseBase(layer), TransposedBase(turned)
    y, back = dense.DENSE_PRODUCT(x, layer.weight, False), dense.DENSE_PRODUCT(grad, layer.weight, True)
    assert torch.equal(base.matmul(x), y) and torch.equal(base.matmul_t(grad), back)
    assert torch.equal(same.matmul(x), y) and torch.equal(same.matmul_t(grad), back)
    added = back.clone()
    dense.DENSE_PRODUCT_ADD(added, grad, layer.weight, True)
    assert torch.equal(sum_of_matmul_t((base, base), (grad, grad)), added)
    assert torch.equal(sum_of_matmul_t((base, same), (grad, grad)), added)
    with operators.torch_only():
        plain = torch.mm(grad, layer.weight)
        assert torch.equal(sum_of_matmul_t((base, base), (grad, grad)), plain + plain)


def test_serves_frozen_weights_in_bf16_that_lie_in_whole_sixteens(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(3, 32), drawn(48, 32)
    assert choose.dense_products(x, weight) is not None
    assert choose.dense_products(x, nn.Parameter(weight, requires_grad=False)) is not None
    assert choose.dense_products(x.float(), weight) is None and choose.dense_products(x.float(), weight.float()) is None
    assert choose.dense_products(x, drawn(40, 32)) is None and choose.dense_products(drawn(3, 24), drawn(48, 24)) is None
    assert choose.dense_products(x, drawn(32, 48).t()) is None and choose.dense_products(drawn(2, 3, 32), weight) is None
    learnt = x.clone().requires_grad_()
    assert choose.dense_products(learnt, weight) is None
    with torch.no_grad():
        assert choose.dense_products(learnt, weight) is not None
    assert frozen_product(learnt, weight).requires_grad
    with operators.torch_only():
        assert choose.dense_products(x, weight) is None
    monkeypatch.undo()
    monkeypatch.setattr(compile, "has", lambda feature: feature == "amx_bf16")
    dense.multiplies.cache_clear()
    monkeypatch.setattr(choose, "CANDIDATES", {})
    try:
        assert choose.dense_products(x, weight) is None
    finally:
        dense.multiplies.cache_clear()


def test_empty_weights_are_left_to_torch() -> None:
    assert torch.equal(frozen_product(drawn(3, 0), drawn(16, 0)), torch.zeros(3, 16, dtype=torch.bfloat16))
    assert torch.equal(frozen_product(drawn(3, 0), drawn(0, 32), across=True), torch.zeros(3, 32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="do not fit each other"):
        dense.DENSE_PRODUCT(drawn(3, 0), drawn(16, 0), False)


def test_a_frozen_weight_that_needs_a_gradient_gets_one() -> None:
    weight = drawn(48, 32).requires_grad_()
    frozen_product(drawn(3, 32), weight).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None


@pytest.mark.parametrize(("tokens", "out", "width"), [(480, 64, 128), (3, 2064, 4112)])
def test_a_ledger_counts_the_products_and_what_the_kernel_works_in(tokens: int, out: int, width: int) -> None:
    ledger = Ledger()
    with ledger:
        with ledger.phase("product"):
            x, weight = torch.empty(tokens, width, dtype=torch.bfloat16), torch.empty(out, width, dtype=torch.bfloat16)
            y = dense.DENSE_PRODUCT(x, weight, False)
        with ledger.phase("sum"):
            dense.DENSE_PRODUCT_ADD(x, y, weight, True)
    given, threads = sum(each.nbytes for each in (x, weight, y)), torch.get_num_threads()
    for phase, depth, columns in (("product", width, out), ("sum", out, width)):
        panels = -(-columns // 48)
        sums = threads * 384 * 48 * 4 if depth > 2048 else 0
        together = 2 if depth <= 2048 and 4 * threads * depth * 48 <= 7 << 17 and panels >= 2 * threads else 1
        groups = -(-panels // max(threads, ((7 << 17) - sums) // (2 * 48 * depth)))
        scratch = 64 + max(-(-panels // groups) * depth, threads * min(together * depth, 2048 * together)) * 2 * 48 + sums
        assert ledger.work[phase].flops == 2 * tokens * out * width
        assert ledger.peaks[phase].bytes == given + scratch


@pytest.mark.parametrize(("x", "weight", "y"), [((4, 32), (16, 48), 16), ((4, 24), (16, 24), 16), ((4, 32), (24, 32), 24)])
def test_tensors_that_do_not_fit_are_refused(x: Any, weight: Any, y: int) -> None:
    with pytest.raises(ValueError, match="do not fit each other, or are not in whole 16"):
        dense.DENSE_PRODUCT(drawn(*x), drawn(*weight), False)
    with pytest.raises(ValueError, match="do not fit each other"):
        dense.DENSE_PRODUCT_ADD(drawn(3, y), drawn(*x), drawn(*weight), False)


def test_both_operators_pass_torch_s_own_checks() -> None:
    x, grad, weight = drawn(5, 32), drawn(5, 48), drawn(48, 32)
    checked: list[tuple[Any, tuple[Any, ...]]] = [
        (dense.DENSE_PRODUCT, (x, weight, False)),
        (dense.DENSE_PRODUCT, (grad, weight, True)),
        (dense.DENSE_PRODUCT_ADD, (x.clone(), grad, weight, True)),
    ]
    for operator, given in checked:
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
