"""NF4 against bitsandbytes, byte by byte and bit by bit, with its kernels and without."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lorakeet.core.scratch import SCRATCH
from lorakeet.quant import nf4
from lorakeet.quant.nf4 import LEVELS, Nf4Base

SHAPES = [(64, 64), (6, 128), (7, 48), (16, 100), (5, 33), (1, 1), (576, 320)]  # also rows that end within a block, and odd sizes
DTYPES = [torch.float32, torch.bfloat16]


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    weight[0, : shape[1] // 2] = 0
    return weight.to(dtype)


def theirs(weight: Tensor, *, block_size: int, double_quant: bool) -> tuple[Tensor, object]:
    assert nf4.has_bitsandbytes(torch.device("cpu"))
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [64, 32])
def test_bytes_and_numbers_are_those_of_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(shape, dtype)
    base = Nf4Base.of(weight, block_size=block_size, double_quant=double_quant)
    packed, state = theirs(weight, block_size=block_size, double_quant=double_quant)
    assert torch.equal(base.packed, packed.view(-1))
    assert torch.equal(base.absmax, state.absmax)  # type: ignore[attr-defined]
    if double_quant:
        assert torch.equal(base.scales, state.state2.absmax) and torch.equal(base.mean, state.offset)  # type: ignore[attr-defined]
    for out_dtype in DTYPES:
        with_kernels = base.unpack(torch.empty(shape, dtype=out_dtype))
        with monkeypatch.context() as without:
            without.setattr(nf4, "has_bitsandbytes", lambda device: False)
            assert torch.equal(base.unpack(torch.empty(shape, dtype=out_dtype)), with_kernels)
        if shape[1] % block_size == 0:  # elsewhere its CPU kernel reads the wrong absmax
            from bitsandbytes.functional import dequantize_4bit

            state.dtype = out_dtype  # type: ignore[attr-defined]
            assert torch.equal(dequantize_4bit(packed, state), with_kernels)  # type: ignore[arg-type]


def test_every_number_is_the_nearest_level_of_its_block() -> None:
    weight = random_weight((12, 64), seed=3)
    found = Nf4Base.of(weight, double_quant=False).dense()
    largest = weight.abs().amax(1, keepdim=True)
    distance = (weight[:, :, None] - torch.tensor(LEVELS) * largest[:, :, None]).abs().amin(2)
    torch.testing.assert_close((found - weight).abs(), distance, rtol=0, atol=1e-8)


def test_bits_a_number() -> None:
    base = Nf4Base.of(random_weight((512, 512)))
    assert base.bytes * 8 / 512**2 == pytest.approx(4.127, abs=0.001)
    assert Nf4Base.of(random_weight((512, 512)), double_quant=False).bytes * 8 / 512**2 == 4.5


def test_a_cast_of_the_model_leaves_the_code_alone() -> None:
    base = Nf4Base.of(random_weight((10, 64)))
    before = base.dense()
    assert torch.equal(base.to(torch.bfloat16).half().double().dense(), before)


def test_on_the_meta_device_it_has_shapes_only() -> None:
    base = Nf4Base((8, 64), device="meta")
    assert base.matmul(torch.empty(3, 64, device="meta")).shape == (3, 8)


def test_under_a_trace_it_is_fake_and_leaves_nothing_behind() -> None:
    base, x = Nf4Base.of(random_weight((8, 64))), torch.randn(3, 64)
    before = base.matmul(x)
    with FakeTensorMode():
        traced = Nf4Base((8, 64)).matmul(torch.empty(3, 64))
    assert isinstance(traced, FakeTensor) and traced.shape == (3, 8)
    assert torch.equal(base.matmul(x), before)
    SCRATCH.clear()


def test_wrong_settings_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size is 60"):
        Nf4Base((4, 4), block_size=60)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        Nf4Base((4, 4)).store(torch.zeros(3, 4))


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nf4.bitsandbytes_advice() == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'lorakeet[nf4]'" in nf4.bitsandbytes_advice()
