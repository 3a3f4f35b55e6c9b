"""NF4 weights through the Triton kernels, in Triton's interpreter: the bits that torch's operations give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakeet.kernels.tiled_weight import TritonRequest
from lorakeet.quant.nf4 import Nf4Base
from tiny.triton_device import DEVICE, behave_like_a_card, needs_triton

pytestmark = needs_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# also rows that end within a block, a last block that is not full, more than one block of scales
SHAPES = [(64, 64), (7, 48), (16, 100), (5, 34), (1, 2), (40, 576)]


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    behave_like_a_card(monkeypatch)


def base_of(shape: tuple[int, int], **settings: object) -> Nf4Base:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[0, : shape[1] // 2] = 0
    return Nf4Base.of(weight, **settings).to(DEVICE)  # type: ignore[arg-type]


def both(base: Nf4Base, dtype: torch.dtype, rows: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of W by torch's operations, and as the kernels of products read them."""
    from lorakeet.kernels.triton.tiles import unpack_tiles

    tiles = base.in_tiles()
    assert tiles is not None
    blank = [torch.full((rows, base.shape[1]), 7.0, dtype=dtype, device=DEVICE) for _ in "12"]
    return base.unpack(blank[0], first), unpack_tiles(tiles, blank[1], first)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [64, 32, 256])
def test_the_same_bits(shape: tuple[int, int], double_quant: bool, block_size: int) -> None:
    base = base_of(shape, block_size=block_size, double_quant=double_quant)
    for dtype in DTYPES:
        expected, found = both(base, dtype, shape[0])
        assert torch.equal(found, expected)


def test_they_are_not_dequantised_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes does that; without it torch."""
    base = base_of((64, 64))
    expected = base.dense()
    monkeypatch.setattr("lorakeet.kernels.triton.tiles.unpack_tiles", lambda *_: pytest.fail("a kernel of Triton's ran"))
    base.kernels = TritonRequest()
    assert base.tiles_to_dequantise() is None and torch.equal(base.dense(), expected)


def test_from_a_row_on() -> None:
    base = base_of((520, 96))
    assert base.row_step == 512
    expected, found = both(base, torch.bfloat16, 8, 512)
    assert torch.equal(found, expected) and torch.equal(found.float(), base.dense()[512:].bfloat16().float())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("shape", "block_size"), [((48, 100), 64), ((40, 192), 64), ((33, 128), 32), ((20, 512), 256)])
def test_a_product_multiplies_with_these_bits(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype, transposed: bool
) -> None:
    from lorakeet.kernels.triton.tiles import TilePair, dense_tiles, fused_product

    base = base_of(shape, block_size=block_size)
    weight = base.unpack(torch.empty(shape, dtype=dtype, device=DEVICE))
    depth, width = shape if transposed else shape[::-1]
    chance = torch.Generator().manual_seed(1)
    sizes = (9, depth), (4, depth), (4, width)
    x, shrink, expand = (torch.randn(size, generator=chance).to(dtype).to(DEVICE) for size in sizes)
    pair = TilePair(shrink, expand, before=1.0, after=3.0)
    tiles = base.in_tiles()
    assert tiles is not None
    by_tiles, by_dense = (fused_product(each, x, pair, transposed=transposed) for each in (tiles, dense_tiles(weight)))
    for found, expected in zip(by_tiles, by_dense, strict=True):
        assert found is not None and expected is not None and torch.equal(found, expected)


def test_an_odd_width_has_no_product() -> None:
    base = base_of((5, 33))
    assert base.in_tiles() is None
    base.kernels = TritonRequest()
    x = torch.randn(2, 33, device=DEVICE)
    torch.testing.assert_close(base.matmul(x), x @ base.dense().t())
