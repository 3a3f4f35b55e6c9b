"""Rows coded in int8 and their products: the same bits as whole numbers written out, whatever the shape and the threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.kernels import choose
from lorakeet.kernels.cpu import int8_rows, operators
from lorakeet.memory.ledger import Ledger
from tiny.native import needs_native

pytestmark = needs_native


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a processor with AMX, which multiplies by that."""
    monkeypatch.setattr(int8_rows, "AMX", "no such feature")
    monkeypatch.setattr(choose, "CANDIDATES", {})


def drawn(tokens: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def weight_of(out: int, width: int) -> tuple[Tensor, Tensor]:
    """A weight in int8 with all its values, and its scale."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(-127, 128, (out, width), dtype=torch.int8, generator=draw), torch.rand(out, generator=draw)


def in_steps(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Whole steps of each row, and what one is worth, as torch computes them."""
    steps = rows.abs().amax(1, keepdim=True).float() / 127
    return (rows * (1 / steps)).round().to(torch.int32), steps


@pytest.mark.parametrize("width", [16, 48, 592])
def test_codes_are_the_nearest_steps(width: int) -> None:
    x, by = drawn(7, width), torch.rand(width, generator=torch.Generator().manual_seed(2))
    for rows, given in ((x, None), (x * by, by)):
        codes, steps = int8_rows.QUANTISE_ROWS(x, given)
        expected, worth = in_steps(rows)
        assert torch.equal(steps, worth) and torch.equal(codes.int() - 128, expected)


@pytest.mark.parametrize(
    ("tokens", "out", "width"), [(1, 16, 16), (5, 17, 48), (6, 64, 64), (241, 80, 80), (500, 3, 208), (12, 1040, 16), (0, 32, 32)]
)
def test_products_are_those_of_whole_numbers(tokens: int, out: int, width: int) -> None:
    weight, scale = weight_of(out, width)
    for across, of_columns, depth in ((False, scale, width), *([(True, None, out)] if out % 16 == 0 else [])):
        codes = torch.randint(1, 256, (tokens, depth), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
        steps = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(4))
        sums = (codes.double() - 128) @ (weight.double() if across else weight.double().t())
        expected = sums.float() * steps * (1.0 if of_columns is None else of_columns)
        assert torch.equal(int8_rows.INT8_PRODUCT(codes, steps, weight, of_columns, across), expected.bfloat16())


def with_loud_columns(tokens: int, width: int) -> tuple[Tensor, list[int]]:
    x, loud = drawn(tokens, width), [1, 17, width - 1, width // 2]
    x[:, loud] *= 40
    return x, loud


@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (7, 96), (300, 592)])
def test_the_loudest_columns_are_found(tokens: int, width: int) -> None:
    x, loud = with_loud_columns(tokens, width)
    count = int8_rows.outliers_of(width)
    columns, apart = int8_rows.OUTLIER_COLUMNS(x, count)
    peaks = x.float().abs().amax(0)
    assert set(loud) <= set(columns.tolist()) and len(set(columns.tolist())) == count
    assert torch.equal(peaks[columns], peaks.sort(descending=True).values[:count])
    assert torch.equal(apart, x[:, columns])
    codes, steps = int8_rows.QUANTISE_ROWS(x, None, columns)
    plain, worth = int8_rows.QUANTISE_ROWS(x.index_fill(1, columns, 0), None)
    assert torch.equal(codes, plain) and torch.equal(steps, worth)


def test_how_many_columns_are_apart() -> None:
    assert [int8_rows.outliers_of(width) for width in (16, 31, 32, 64, 128, 576)] == [0, 0, 2, 4, 8, 8]
    columns, apart = int8_rows.OUTLIER_COLUMNS(torch.zeros(3, 16, dtype=torch.bfloat16), 0)
    assert columns.shape == (0,) and apart.shape == (3, 0)


@pytest.mark.parametrize(("tokens", "out", "width"), [(1, 16, 64), (9, 80, 96), (250, 131, 592)])
def test_columns_that_are_apart_are_added(tokens: int, out: int, width: int) -> None:
    x, _ = with_loud_columns(tokens, width)
    weight, scale = weight_of(out, width)
    exact = x.double() @ (weight.double() * scale[:, None].double()).T
    columns, apart = int8_rows.OUTLIER_COLUMNS(x, int8_rows.outliers_of(width))
    codes, steps = int8_rows.QUANTISE_ROWS(x, None, columns)
    found = int8_rows.INT8_PRODUCT(codes, steps, weight, scale, False, columns, apart)
    sums = (codes.double() - 128) @ weight.double().T * steps.double() + apart.double() @ weight[:, columns].double().T
    torch.testing.assert_close(found.double(), sums * scale.double(), rtol=2**-8, atol=1e-3)
    plain = int8_rows.INT8_PRODUCT(*int8_rows.QUANTISE_ROWS(x, None), weight, scale, False)
    near, far = (float((each.double() - exact).norm() / exact.norm()) for each in (found, plain))
    assert near < far / 4


def test_columns_that_are_none_are_refused() -> None:
    x, (weight, scale) = drawn(2, 64), weight_of(16, 64)
    for columns in ([64, 0], [-1, 0], [1], list(range(10))):
        with pytest.raises(ValueError, match="an even number of columns below 64, 8 at most; given"):
            int8_rows.quantise_rows(x, None, torch.tensor(columns))
    with pytest.raises(ValueError, match="3 outlier columns of"):
        int8_rows.outlier_columns(x, 3)
    columns, apart = int8_rows.OUTLIER_COLUMNS(x, 4)
    codes, steps = int8_rows.QUANTISE_ROWS(x, None, columns)
    for given in ((columns, None), (None, apart), (columns, apart[:1])):
        with pytest.raises(ValueError, match="do not fit each other"):
            int8_rows.int8_product(codes, steps, weight, scale, False, *given)


def test_threads_change_no_bit() -> None:
    weight, scale = weight_of(208, 96)
    codes, steps = int8_rows.QUANTISE_ROWS(drawn(700, 96), None)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((*int8_rows.QUANTISE_ROWS(drawn(700, 96), None), int8_rows.INT8_PRODUCT(codes, steps, weight, scale,
            False)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_largest_sums_are_exact() -> None:
    width = 1 << 17
    codes, weight = torch.tensor([[255], [1]], dtype=torch.uint8).expand(2, width).contiguous(), torch.full((2, width), 127)
    weight[1] = -127
    found = int8_rows.INT8_PRODUCT(codes, torch.ones(2, 1), weight.to(torch.int8), torch.ones(2), False)
    most = float(torch.tensor(127.0 * 127 * width).bfloat16())
    assert found.tolist() == [[most, -most], [-most, most]]
    assert choose.int8_products(torch.zeros(1, width + 16, dtype=torch.bfloat16)) is None
    assert choose.int8_products(torch.zeros(1, width).bfloat16()) is int8_rows


def others_than(row: int) -> list[int]:
    return [other for other in range(9) if other != row]


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("place", [0, 31])
def test_what_is_no_number_stays_none_and_stays_in_its_row(bad: str, place: int) -> None:
    weight, scale = weight_of(48, 32)
    x = drawn(9, 32)
    alone = int8_rows.INT8_PRODUCT(*int8_rows.QUANTISE_ROWS(x, None), weight, scale, False)
    x[4, place] = float(bad)
    found = int8_rows.INT8_PRODUCT(*int8_rows.QUANTISE_ROWS(x, None), weight, scale, False)
    assert bool(found[4].isnan().all())
    back = int8_rows.INT8_PRODUCT(*int8_rows.QUANTISE_ROWS(x, torch.rand(32) + 0.1), *weight_of(32, 16)[:1], None, True)
    assert bool(back[4].isnan().all()) and bool(back[others_than(4)].isfinite().all())
    others = others_than(4)
    assert torch.equal(found[others], alone[others])


def test_a_ledger_counts_the_products_and_what_the_kernel_works_in() -> None:
    ledger, tokens = Ledger(), 480
    with ledger, ledger.phase("products"):
        codes, steps = torch.empty(tokens, 64, dtype=torch.uint8), torch.empty(tokens, 1)
        weight, scale = torch.empty(128, 64, dtype=torch.int8), torch.empty(128)
        int8_rows.INT8_PRODUCT(codes, steps, weight, scale, False)
        with ledger.phase("apart"):
            columns, apart = torch.empty(4, dtype=torch.int64), torch.empty(tokens, 4, dtype=torch.bfloat16)
            int8_rows.INT8_PRODUCT(codes, steps, weight, scale, False, columns, apart)
    assert ledger.work["apart"].flops == 2 * tokens * 128 * (64 + 4)
    assert ledger.work["products"].flops == 2 * tokens * weight.numel()
    scratch = min(torch.get_num_threads(), 2 * 2) * 64 * 64
    given = sum(each.nbytes for each in (codes, steps, weight, scale))
    assert ledger.peaks["products"].bytes == scratch + given + 2 * tokens * 128


@pytest.mark.parametrize(
    ("codes", "steps", "weight", "scale"),
    [
        ((4, 32), 4, (16, 16), 16),
        ((4, 16), 3, (16, 16), 16),
        ((4, 16), 4, (16, 16), 8),
        ((4, 24), 4, (16, 24), 16),
    ],
)
def test_tensors_that_do_not_fit_are_refused(codes: Any, steps: int, weight: Any, scale: int) -> None:
    given = torch.zeros(codes, dtype=torch.uint8), torch.zeros(steps, 1), torch.zeros(weight, dtype=torch.int8)
    with pytest.raises(ValueError, match="do not fit each other"):
        int8_rows.INT8_PRODUCT(*given, torch.zeros(scale), False)


@pytest.mark.parametrize(("rows", "by"), [((1, 8), None), ((64,), None), ((1, 64), 16), ((1, 64), 80)])
def test_rows_that_cannot_be_coded_are_refused(rows: tuple[int, ...], by: int | None) -> None:
    with pytest.raises(ValueError, match="do not fit each other, or are not in whole 16"):
        int8_rows.quantise_rows(torch.ones(rows, dtype=torch.bfloat16), None if by is None else torch.ones(by))


def test_both_operators_pass_torch_s_own_checks() -> None:
    codes, steps = int8_rows.QUANTISE_ROWS(drawn(5, 32), None)
    weight, scale = weight_of(48, 32)
    checked: list[tuple[Any, tuple[Any, ...]]] = [
        (int8_rows.QUANTISE_ROWS, (drawn(5, 32), None)),
        (int8_rows.QUANTISE_ROWS, (drawn(5, 32), torch.rand(32))),
        (int8_rows.OUTLIER_COLUMNS, (drawn(5, 64), 4)),
        (int8_rows.QUANTISE_ROWS, (drawn(5, 32), None, torch.tensor([3, 1]))),
        (int8_rows.INT8_PRODUCT, (codes, steps, weight, scale, False, torch.tensor([3, 1]), drawn(5, 2))),
        (int8_rows.INT8_PRODUCT, (codes, steps, weight, scale, False)),
    ]
    for operator, given in checked:
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


def test_serves_where_the_other_operators_do_but_not_where_tiles_of_int8_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose.int8_products(drawn(3, 32)) is int8_rows and choose.int8_products(drawn(3, 24)) is None
    assert choose.int8_products(drawn(3, 32).float()) is None
    with operators.torch_only():
        assert choose.int8_products(drawn(3, 32)) is None
    monkeypatch.setattr(int8_rows, "AMX", "avx512f")  # which every processor has that the library is built for
    monkeypatch.setattr(choose, "CANDIDATES", {})
    assert choose.int8_products(drawn(3, 32)) is None
