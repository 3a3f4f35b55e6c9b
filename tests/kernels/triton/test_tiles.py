"""The Triton kernels over a plain weight, in Triton's interpreter: every result within its stated rounding of the exact one.

On a machine with a CUDA device the same tests run on it: pytest tests/kernels/triton/test_tiles.py …
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiny.triton_device import DEVICE, behave_like_a_card, needs_triton

pytestmark = needs_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUT, IN = 72, 100  # no multiples of a tile


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    behave_like_a_card(monkeypatch)


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def within(found: Tensor, exact: Tensor, terms: Tensor, depth: int, inner: Tensor | float = 0.0) -> None:
    """`found` is `exact` but for one rounding to its dtype, that of what is on the way (`inner`, already times half an epsilon),
    and sums of `depth` terms in fp32 whose sizes add up to `terms`."""
    half = torch.finfo(found.dtype).eps / 2
    allowed = half * exact.abs() + inner + 2 * depth * torch.finfo(torch.float32).eps * terms
    worst = float(((found.double() - exact).abs() - allowed * 1.01 - 1e-7).max())
    assert worst <= 0, worst


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "rank"), [(1, 1), (3, 16), (17, 20), (70, 64), (5, 0)])
def test_product_and_pair(tokens: int, rank: int, dtype: torch.dtype, transposed: bool) -> None:
    from lorakeet.kernels.triton.tiles import TilePair, dense_tiles, fused_product

    weight = numbers(OUT, IN, dtype=dtype, seed=0)
    depth, width = (OUT, IN) if transposed else (IN, OUT)
    x = numbers(tokens, depth, dtype=dtype, seed=1)
    W = weight.double() if transposed else weight.double().t()
    exact, terms = x.double() @ W, x.double().abs() @ W.abs()
    if not rank:
        y, shrunk = fused_product(dense_tiles(weight), x, transposed=transposed)
        assert shrunk is None
        within(y, exact, terms, depth)
        return
    shrink, expand = numbers(rank, depth, dtype=dtype, seed=2), numbers(width, rank, dtype=dtype, seed=3).t()
    y, shrunk = fused_product(dense_tiles(weight), x, TilePair(shrink, expand, before=0.5, after=3.0), transposed=transposed)
    assert shrunk is not None and y.dtype == shrunk.dtype == dtype and shrunk.shape == (tokens, rank)
    exact_shrunk = 0.5 * x.double() @ shrink.double().t()
    within(shrunk, exact_shrunk, 0.5 * x.double().abs() @ shrink.double().abs().t(), depth)
    added = 3.0 * shrunk.double() @ expand.double()  # of what was rounded on the way
    within(y, exact + added, terms + added.abs(), depth + rank)


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_weight_may_lie_column_by_column_and_x_in_any_order(contiguous: bool) -> None:
    from lorakeet.kernels.triton.tiles import dense_tiles, fused_product

    weight = numbers(IN, OUT, dtype=torch.float32, seed=0).t()
    x = numbers(4, IN, dtype=torch.float32, seed=1)
    given = x if contiguous else x.t().contiguous().t()
    y, _ = fused_product(dense_tiles(weight), given)
    assert torch.equal(y, fused_product(dense_tiles(weight.contiguous()), x)[0])
    torch.testing.assert_close(y, x @ weight.t())


def test_unpacking_a_plain_weight_copies_it_from_any_row_on() -> None:
    from lorakeet.kernels.triton.tiles import dense_tiles, unpack_tiles

    weight = numbers(OUT, IN, dtype=torch.float32, seed=0)
    assert torch.equal(unpack_tiles(dense_tiles(weight), torch.empty_like(weight)), weight)
    part = unpack_tiles(dense_tiles(weight), torch.empty((5, IN), dtype=torch.bfloat16, device=DEVICE), 7)
    assert torch.equal(part, weight[7:12].bfloat16())
    guarded = torch.full((6, IN), 9.0, device=DEVICE)
    unpack_tiles(dense_tiles(weight), guarded[:3], OUT - 3)
    assert torch.equal(guarded[:3], weight[-3:]) and bool((guarded[3:] == 9.0).all())


def test_x_of_another_width_is_refused() -> None:
    from lorakeet.kernels.triton.tiles import dense_tiles, fused_product

    with pytest.raises(ValueError, match=r"x is \(2, 5\), but the weight takes \(tokens, 100\)"):
        fused_product(dense_tiles(numbers(OUT, IN, dtype=torch.float32, seed=0)), numbers(2, 5, dtype=torch.float32, seed=1))


def test_kernels_are_launched_on_the_device_of_their_tensors() -> None:
    from lorakeet.kernels.triton.tiles import on_device

    assert on_device(torch.device("cuda", 1)).idx == 1  # type: ignore[attr-defined]
    with on_device(torch.device("cpu")) as nothing:
        assert nothing is None


def test_tiles_grow_with_the_tokens_and_stay_small_for_wide_numbers() -> None:
    from lorakeet.kernels.triton.tiles import tile_sizes

    assert [tile_sizes(tokens, 2, transposed=False).tokens for tokens in (1, 16, 17, 33, 500)] == [16, 16, 32, 64, 64]
    few, many = (tile_sizes(tokens, 2, transposed=False) for tokens in (1, 64))
    assert few.rows < many.rows and tile_sizes(64, 4, transposed=True) == tile_sizes(1, 4, transposed=False)
