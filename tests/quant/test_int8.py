"""int8 by rows: half a step of error at most, rounded once, tiles that change nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakeet.core.base import matmul_each
from lorakeet.kernels import choose
from lorakeet.kernels.cpu import int8_rows, operators
from lorakeet.kernels.device import standing_for
from lorakeet.quant.int8 import Int8Base, enable_int8_products
from tiny.native import needs_native


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a processor with AMX, which multiplies by that."""
    monkeypatch.setattr(int8_rows, "AMX", "no such feature")


@pytest.fixture
def weight() -> torch.Tensor:
    found = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    found[3] = 0
    return found


def test_each_number_is_off_by_half_a_step_at_most(weight: torch.Tensor) -> None:
    base = Int8Base.of(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((base.dense() - weight).abs() <= step * 0.5001).all())
    assert base.dense().abs().amax(1).tolist() == pytest.approx(weight.abs().amax(1).tolist())
    assert base.bytes == weight.numel() + 4 * 9


def test_unpacking_rounds_once(weight: torch.Tensor) -> None:
    base = Int8Base.of(weight)
    assert torch.equal(base.unpack(torch.empty(9, 50, dtype=torch.bfloat16)), base.dense().bfloat16())


def test_another_shape_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(9, 50\)"):
        Int8Base((4, 4)).store(weight)


@pytest.fixture
def trained() -> Int8Base:
    """A base that multiplies in int8, in training mode."""
    base = Int8Base.of(torch.randn(48, 64, generator=torch.Generator().manual_seed(1)))
    assert enable_int8_products(base) == 1
    return base.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_int8_are_near_the_exact_ones(trained: Int8Base, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(40, width, generator=draw).to(dtype) for width in (64, 48))
    given = x.clone(), grad.clone()
    weight = trained.dense()
    for found, exact in ((trained.matmul(x), x.float() @ weight.t()), (trained.matmul_t(grad), grad.float() @ weight)):
        assert found.dtype == dtype and found.shape == exact.shape
        off = float((found.float() - exact).norm() / exact.norm())
        assert 1e-3 < off < 0.02  # rounded, and by about a step of 127
    assert torch.equal(x, given[0]) and torch.equal(grad, given[1])


def test_codes_that_need_no_rounding_multiply_exactly(trained: Int8Base) -> None:
    codes = torch.randint(-127, 128, (8, 64), generator=torch.Generator().manual_seed(3)).float()
    codes[:, :9] = 127  # also without the columns that are kept apart
    torch.testing.assert_close(trained.matmul(codes / 64), codes / 64 @ trained.dense().t(), rtol=1e-5, atol=1e-5)


def test_judging_multiplies_exactly(trained: Int8Base) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    assert torch.equal(trained.eval().matmul(x), x @ trained.dense().t())
    assert not torch.equal(trained.train().matmul(x), x @ trained.dense().t())


def test_a_row_of_zeros_and_one_that_is_no_number_stay_by_themselves(trained: Int8Base) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    alone = trained.matmul(x[:1])
    x[1], x[2, 3], x[3, 3] = 0, float("nan"), float("inf")
    found = trained.matmul(x)
    near = float((found[0] - alone[0]).norm() / alone[0].norm())  # which columns are kept apart is for all rows
    assert near < 0.02 and not found[1].any()
    assert not torch.isfinite(found[2]).any() and not torch.isfinite(found[3]).all()


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
def test_columns_that_are_large_in_every_row_do_not_cost_the_others(trained: Int8Base, native: bool) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(8))
    x[:, [3, 60]] *= 40
    x = x.bfloat16()
    exact = x.float() @ trained.dense().t()

    def off() -> float:
        return float((trained.matmul(x).float() - exact).norm() / exact.norm())

    with nullcontext() if native else operators.torch_only(), pytest.MonkeyPatch.context() as patch:
        near = off()
        patch.setattr(int8_rows, "OUTLIERS", 0)
        assert near < 0.004 < off()


@needs_native
@pytest.mark.parametrize("tokens", [1, 13])
def test_the_native_library_gives_torch_s_bits(trained: Int8Base, tokens: int) -> None:
    draw = torch.Generator().manual_seed(6)
    x, grad = (torch.randn(tokens, width, generator=draw).bfloat16() for width in (64, 48))
    assert choose.int8_products(x) is int8_rows and choose.int8_products(grad) is int8_rows
    found = trained.matmul(x), trained.matmul_t(grad)
    with operators.torch_only():
        assert torch.equal(found[0], trained.matmul(x)) and torch.equal(found[1], trained.matmul_t(grad))


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
def test_several_weights_code_what_they_see_once(
    trained: Int8Base, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, exact = Int8Base.of(torch.randn(5, 64)).train(), Int8Base.of(torch.randn(8, 64)).train()
    enable_int8_products(narrow)  # of a width that no kernel's registers have, and `exact` in no products in int8
    bases, x = (trained, exact, narrow), torch.randn(3, 64, generator=torch.Generator().manual_seed(7))
    x = x.bfloat16() if native else x
    expected = [base.matmul(x) for base in bases]
    calls: list[torch.Tensor] = []
    code = Int8Base.quantise
    monkeypatch.setattr(Int8Base, "quantise", lambda base, given: calls.append(given) or code(base, given))
    for found, one in zip(matmul_each(bases, x), expected, strict=True):
        assert torch.equal(found, one)
    assert len(calls) == 1


class Layouts(TorchDispatchMode):
    """The strides of what int8 products sum over, in each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._int_mm.default:
            self.found.append((args[0].stride(1), args[1].stride(0)))
        return func(*args, **(kwargs or {}))


def test_on_a_card_both_products_have_the_layout_of_cublaslt(trained: Int8Base) -> None:
    """Rows times columns: of the other layouts PyTorch's issue 169956 says that they fail, or are likely to change."""
    draw = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(40, width, generator=draw) for width in (64, 48))
    with operators.torch_only():
        expected = trained.matmul(x), trained.matmul_t(grad)
    with standing_for(torch.device("cuda", 0)), Layouts() as layouts:
        found = trained.matmul(x), trained.matmul_t(grad)
    assert layouts.found == [(1, 1), (1, 1)], "what is summed over lies side by side in both"
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_only_int8_weights_are_reported() -> None:
    assert enable_int8_products(torch.nn.Linear(3, 3)) == 0
