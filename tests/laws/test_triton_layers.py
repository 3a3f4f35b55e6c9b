"""When the Triton kernels compute, and that a layer learns through them what it learns through torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakeet.core.base import DenseBase, FrozenBase
from lorakeet.core.lowrank import frozen_linear, low_rank_linear
from lorakeet.kernels import choose
from lorakeet.kernels.choose import fused_pair, product_as_stored
from lorakeet.kernels.tiled_weight import TritonRequest
from lorakeet.kernels.triton import support
from lorakeet.quant.gptq import GptqBase, groups_in_order, quantise_to_nearest
from lorakeet.quant.nf4 import Nf4Base
from tiny.triton_device import COMPILED, DEVICE, behave_like_a_card, interpret_without_a_card, needs_triton

OUT, IN, RANK, SCALE = 64, 96, 4, 3.0


@pytest.fixture(autouse=True)
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if support.has_triton():
        behave_like_a_card(monkeypatch)


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def dense(dtype: torch.dtype = torch.float32) -> FrozenBase:
    module = nn.Linear(IN, OUT, bias=False, dtype=dtype, device=DEVICE).requires_grad_(False)
    module.weight.copy_(numbers(OUT, IN, seed=0) / IN**0.5)
    return DenseBase(module)


def nf4(dtype: torch.dtype = torch.float32) -> FrozenBase:
    return Nf4Base.of(numbers(OUT, IN, seed=0).cpu() / IN**0.5).to(DEVICE)


def gptq(dtype: torch.dtype = torch.float32) -> FrozenBase:
    weight = numbers(OUT, IN, seed=0).cpu() / IN**0.5
    codes, grid = quantise_to_nearest(weight, 4, False, groups_in_order(IN, 32), 3)
    return GptqBase.of(codes, grid, bits=4, sym=False).to(DEVICE)


BASES = [dense, nf4, gptq]


def trained(base: FrozenBase, asked: TritonRequest | None, dtype: torch.dtype, tokens: int = 5) -> list[Tensor]:
    """y, and the gradients of x, A and B, of a layer over `base` whose loss weighs every result differently."""
    base.kernels = asked  # type: ignore[attr-defined]
    x = numbers(tokens, IN, seed=1, dtype=dtype).requires_grad_()
    A, B = (numbers(RANK, IN, seed=2) / IN**0.5).requires_grad_(), numbers(OUT, RANK, seed=3).requires_grad_()
    y = low_rank_linear(x, base, (A, B, SCALE), bias=numbers(OUT, seed=5, dtype=dtype))
    (y.float() * numbers(tokens, OUT, seed=4)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in (x, A, B) if leaf.grad is not None)]


@needs_triton
@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 16), (torch.bfloat16, 3), (torch.float16, 3)], ids=str)
def test_a_layer_learns_the_same_through_the_kernels(
    make: Callable[[torch.dtype], FrozenBase], dtype: torch.dtype, roundings: int
) -> None:
    base = make(dtype)
    plain, fused = trained(base, None, dtype), trained(base, TritonRequest(), dtype)
    assert len(plain) == len(fused) == 4
    for expected, found in zip(plain, fused, strict=True):
        allowed = roundings * torch.finfo(dtype).eps * float(expected.float().abs().max())
        assert float((found.float() - expected.float()).abs().max()) <= allowed


@needs_triton
@pytest.mark.parametrize("make", BASES)
def test_the_bounds_of_the_dispatch(make: Callable[[torch.dtype], FrozenBase], monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = make(torch.float32)
    x, grad = numbers(5, IN, seed=1), numbers(5, OUT, seed=2)
    A, B = numbers(RANK, IN, seed=3), numbers(OUT, RANK, seed=4)
    assert fused_pair(base, x, A, B, SCALE) is None  # nobody asked
    base.kernels = TritonRequest(5)
    assert fused_pair(base, x, A, B, SCALE) is not None and fused_pair(base, grad, A, B, SCALE, back=True) is not None
    assert product_as_stored(base, x) is not None and product_as_stored(base, grad, across=True) is not None
    assert fused_pair(base, x.double(), A.double(), B.double(), SCALE) is None  # no kernel for it
    assert fused_pair(base, x, A.bfloat16(), B, SCALE) is not None  # cast for the product
    assert product_as_stored(base, x[:0]) is None
    wide = support.RANK + 1
    assert fused_pair(base, x, numbers(wide, IN, seed=3), numbers(OUT, wide, seed=4), SCALE) is None
    base.kernels = TritonRequest(4)
    assert product_as_stored(base, x) is None and product_as_stored(base, x[:4]) is not None
    monkeypatch.setattr(support, "why_not_on", lambda device: "not here")
    monkeypatch.setattr(choose, "CANDIDATES", {})
    assert product_as_stored(base, x[:4]) is None


@needs_triton
def test_a_trace_goes_the_way_of_torch() -> None:
    with FakeTensorMode():
        base = Nf4Base((8, 64))
        base.kernels = TritonRequest()
        assert base.matmul(torch.empty(3, 64)).shape == (3, 8)
    meta = Nf4Base((8, 64), device="meta")
    meta.kernels = TritonRequest()
    assert meta.matmul(torch.empty(3, 64, device="meta")).shape == (3, 8)


@needs_triton
def test_dropout_and_bare_weights() -> None:
    base = nf4()
    base.kernels = TritonRequest()  # type: ignore[attr-defined]
    x, A, B = numbers(4, IN, seed=1), numbers(RANK, IN, seed=2), numbers(OUT, RANK, seed=3)
    torch.manual_seed(0)
    with_kernels = low_rank_linear(x, base, (A, B, SCALE), dropout=0.5)
    base.kernels = None  # type: ignore[attr-defined]
    torch.manual_seed(0)
    torch.testing.assert_close(with_kernels, low_rank_linear(x, base, (A, B, SCALE), dropout=0.5))
    bare = frozen_linear(x, base)
    base.kernels = TritonRequest()  # type: ignore[attr-defined]
    torch.testing.assert_close(frozen_linear(x, base), bare)


@pytest.mark.parametrize("make", [nf4, gptq])
def test_without_a_request_no_buffer_is_read(
    make: Callable[[torch.dtype], FrozenBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, looked = make(torch.float32), []

    def held() -> Iterator[Tensor]:
        for buffer in base.buffers():  # type: ignore[attr-defined]
            looked.append(buffer)
            yield buffer

    device = base.device  # type: ignore[attr-defined]
    monkeypatch.setattr(type(base), "device", property(lambda self: device))
    monkeypatch.setattr(base, "packed_buffers", held)
    base.unpack(torch.empty(OUT, IN, device=DEVICE))  # type: ignore[attr-defined]
    assert not looked
    if support.has_triton() and make is gptq:  # bitsandbytes dequantises NF4
        base.kernels = TritonRequest()  # type: ignore[attr-defined]
        base.unpack(torch.empty(OUT, IN, device=DEVICE))  # type: ignore[attr-defined]
        assert looked


def test_tests_interpret_where_no_gpu_is_and_compile_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for card, expected in ((True, None), (False, "1")):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda card=card: card)
        interpret_without_a_card()
        assert os.environ.get("TRITON_INTERPRET") == expected
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        interpret_without_a_card()
        assert os.environ["TRITON_INTERPRET"] == "0"


@needs_triton
def test_the_interpreter_is_for_the_cpu_alone() -> None:
    assert COMPILED or support.why_not_on(torch.device("cpu")) == ""
    assert support.why_not_on(torch.device("mps"))
