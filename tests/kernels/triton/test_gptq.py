"""GPTQ weights through the Triton kernels, in Triton's interpreter: the bits that torch's operations give."""

from __future__ import annotations

import itertools

import pytest
import torch

from lorakeet.kernels.tiled_weight import TritonRequest
from lorakeet.quant.gptq import GptqBase, GptqGrid, ZeroFormat, groups_in_order
from tiny.triton_device import DEVICE, behave_like_a_card, needs_triton

pytestmark = needs_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUT = 96  # more than a tile, and less than two


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    behave_like_a_card(monkeypatch)


def base_of(
    bits: int, *, zero_format: ZeroFormat = "gptq", size: int = 32, width: int = 96, out: int = OUT, in_order: bool = True
) -> GptqBase:
    """Random codes and zero points, of which some are 0: checkpoints of format "gptq" borrow for these."""
    chance = torch.Generator().manual_seed(bits)
    groups = -(-width // size)
    codes = torch.randint(0, 2**bits, (out, width), generator=chance, dtype=torch.uint8)
    scales = (torch.rand(groups, out, generator=chance) + 0.1).half()
    zeros = torch.randint(0, 2**bits, (groups, out), generator=chance, dtype=torch.uint8)
    zeros[:, ::3] = 0
    g_idx = groups_in_order(width, size)
    if not in_order:
        g_idx = g_idx[torch.randperm(width, generator=chance)]
    base = GptqBase.of(codes, GptqGrid(scales, zeros, g_idx), bits=bits, sym=False, zero_format=zero_format)
    return base.to(DEVICE)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(("bits", "zero_format"), list(itertools.product((2, 3, 4, 8), ("gptq", "gptq_v2"))))
def test_the_same_bits(bits: int, zero_format: ZeroFormat, in_order: bool) -> None:
    base = base_of(bits, zero_format=zero_format, in_order=in_order)
    for dtype in DTYPES:
        base.kernels = None
        expected = base.unpack(torch.empty(base.shape, dtype=dtype, device=DEVICE))
        base.kernels = TritonRequest()
        assert torch.equal(base.unpack(torch.empty(base.shape, dtype=dtype, device=DEVICE)), expected)


@pytest.mark.parametrize(("size", "width"), [(128, 384), (64, 160), (160, 160), (48, 192)])
def test_groups_larger_and_smaller_than_a_tile(size: int, width: int) -> None:
    base = base_of(4, size=size, width=width)
    expected = base.dense()
    base.kernels = TritonRequest()
    assert torch.equal(base.dense(), expected)
    part = base.unpack(torch.empty((32, width), dtype=torch.bfloat16, device=DEVICE), 32)
    assert torch.equal(part, expected[32:64].bfloat16())


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_fewer_rows_than_a_tile(bits: int, in_order: bool) -> None:
    base = base_of(bits, out=8, in_order=in_order)
    expected = base.dense()
    base.kernels = TritonRequest()
    assert torch.equal(base.dense(), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("bits", "in_order"), [(4, True), (4, False), (8, True), (3, False), (2, True)])
def test_a_product_multiplies_with_these_bits(bits: int, in_order: bool, dtype: torch.dtype, transposed: bool) -> None:
    from lorakeet.kernels.triton.tiles import TilePair, dense_tiles, fused_product

    base = base_of(bits, in_order=in_order)
    weight = base.unpack(torch.empty(base.shape, dtype=dtype, device=DEVICE))
    depth, width = base.shape if transposed else base.shape[::-1]
    chance = torch.Generator().manual_seed(1)
    sizes = (9, depth), (4, depth), (4, width)
    x, shrink, expand = (torch.randn(size, generator=chance).to(dtype).to(DEVICE) for size in sizes)
    pair = TilePair(shrink, expand, before=1.0, after=3.0)
    for found, expected in zip(
        fused_product(base.in_tiles(), x, pair, transposed=transposed),
        fused_product(dense_tiles(weight), x, pair, transposed=transposed),
        strict=True,
    ):
        assert found is not None and expected is not None and torch.equal(found, expected)
