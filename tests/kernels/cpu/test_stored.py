"""Weights that C brings back, and multiplies as they are: the bits of quant's own unpacking, and what C is not given."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakeet.core.scratch import SCRATCH
from lorakeet.kernels import choose
from lorakeet.kernels.cpu import dense, operators
from lorakeet.kernels.cpu.stored import (
    GGUF,
    STORED_PRODUCT,
    STORED_PRODUCT_ADD,
    add_stored_product,
    dequantise,
    stored_product,
)
from lorakeet.quant.gguf import BLOCK_TYPES
from lorakeet.quant.gguf_codes import fit_gguf_scales
from lorakeet.quant.gptq import GptqBase, quantise_to_nearest
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase
from tiny.native import needs_native

pytestmark = needs_native
SHAPE = (96, 176)  # blocks of 32 and 64 go over the ends of rows, and the last one of 1,024 is not full
WHOLE = (48, 512)  # rows of whole blocks of 256


def weight(shape: tuple[int, int] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
    numbers[3] = 0
    return numbers


def gptq(*, sym: bool, form: str, order: str, bits: int = 4) -> GptqBase:
    groups = torch.arange(SHAPE[1], dtype=torch.int32) // 16
    if order == "any":
        groups = groups[torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(2))]
    codes, grid = quantise_to_nearest(weight(), bits, sym, groups, 11)
    return GptqBase.of(codes, grid, bits=bits, sym=sym, zero_format="gptq" if form == "gptq" else "gptq_v2")


MADE: dict[str, Callable[[], PackedBase]] = {
    "int8": lambda: Int8Base.of(weight()),
    **{f"nf4 of {size}": lambda size=size: Nf4Base.of(weight(), block_size=size) for size in (32, 64, 1024)},  # type: ignore[misc]
    "nf4 with plain scales": lambda: Nf4Base.of(weight(), double_quant=False),
    **{
        f"{form} {sym} {order}": lambda sym=sym, form=form, order=order: gptq(sym=sym == "sym", form=form, order=order)  # type: ignore[misc]
        for form in ("gptq", "gptq_v2") for sym in ("sym", "asym") for order in ("in order", "any")
    },
    **{f"gguf {kind}": lambda kind=kind: fit_gguf_scales(weight(WHOLE), kind) for kind in GGUF},  # type: ignore[misc]
}  # fmt: skip


def by_torch(base: PackedBase) -> Tensor:
    """All of the weight, dequantised by torch."""
    with operators.torch_only():
        return base.unpack(torch.empty(base.shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", MADE)
def test_what_is_brought_back_is_what_is_unpacked_to_the_last_bit(kind: str) -> None:
    base = MADE[kind]()
    told, unpacked = base.stored(), by_torch(base)
    assert told is not None and told[1:3] == base.shape
    assert torch.equal(dequantise(told, torch.full(base.shape, 7.0, dtype=torch.bfloat16)), unpacked)
    assert float((unpacked.float() - weight(base.shape)).abs().max()) < 0.5  # and it is the weight


@pytest.mark.parametrize("tokens", [0, 1, 9, 500])
@pytest.mark.parametrize("kind", MADE)
def test_products_are_those_with_what_is_brought_back_to_the_last_bit(kind: str, tokens: int) -> None:
    base, threads = MADE[kind](), torch.get_num_threads()
    told, dense_weight = base.stored(), by_torch(base)
    assert told is not None
    for across in (False, True):
        x = torch.randn(tokens, base.shape[0 if across else 1], generator=torch.Generator().manual_seed(3)).bfloat16()
        expected = dense.DENSE_PRODUCT(x, dense_weight, across)
        summed, found = torch.ones_like(expected), torch.ones_like(expected)
        dense.DENSE_PRODUCT_ADD(summed, x, dense_weight, across)
        try:
            for number in (1, 2, 3, 5):  # who lay panels out for themselves, of which some are divided, and for each other
                torch.set_num_threads(number)
                assert torch.equal(stored_product(x, told, across), expected)
        finally:
            torch.set_num_threads(threads)
        add_stored_product(found, x, told, across)
        assert torch.equal(found, summed)


def large(kind: str, shape: tuple[int, int]) -> PackedBase:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    if kind == "gptq":
        codes, grid = quantise_to_nearest(numbers, 4, False, torch.arange(shape[1], dtype=torch.int32) // 64, -(-shape[1] // 64))
        return GptqBase.of(codes, grid, bits=4, sym=False)
    if kind == "int8":
        return Int8Base.of(numbers)
    return Nf4Base.of(numbers) if kind == "nf4" else fit_gguf_scales(numbers, kind)


@pytest.mark.parametrize("shape", [(2096, 2304), (48, 2304)])
@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq", "Q4_K", "Q6_K"])
def test_more_than_is_laid_out_at_once(kind: str, shape: tuple[int, int]) -> None:
    """Sums in parts, by few tokens and in groups, and groups of more columns than are brought back at once."""
    base, threads = large(kind, shape), torch.get_num_threads()
    told, dense_weight = base.stored(), by_torch(base)
    assert told is not None
    try:
        for number, tokens, across in itertools.product((1, 2, 40), (3, 500), (False, True)):
            torch.set_num_threads(number)
            x = torch.randn(tokens, base.shape[0 if across else 1]).bfloat16()
            assert torch.equal(stored_product(x, told, across), dense.DENSE_PRODUCT(x, dense_weight, across))
    finally:
        torch.set_num_threads(threads)


def test_bases_multiply_so_and_bring_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "multiplies", lambda: True)  # also with AMX
    monkeypatch.setattr(choose, "CANDIDATES", {})
    base, x, grad = MADE["nf4 of 64"](), torch.randn(5, SHAPE[1]).bfloat16(), torch.randn(5, SHAPE[0]).bfloat16()
    weight_of = by_torch(base)
    expected, back = torch.mm(x, weight_of.t()), torch.mm(grad, weight_of)
    SCRATCH.clear()
    torch.testing.assert_close(base.matmul(x), expected, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(base.matmul_t(grad), back, rtol=2**-7, atol=1e-2)
    assert not SCRATCH._buffers
    with operators.torch_only():
        base.matmul(x)
    assert SCRATCH._buffers


def test_with_amx_they_are_brought_back_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "multiplies", lambda: False)
    monkeypatch.setattr(choose, "CANDIDATES", {})
    base, x = MADE["int8"](), torch.randn(5, SHAPE[1]).bfloat16()
    SCRATCH.clear()
    torch.testing.assert_close(base.matmul(x), torch.mm(x, by_torch(base).t()))
    assert [held.numel() for held in SCRATCH._buffers.values()] == [SHAPE[0] * SHAPE[1]]


def test_rows_that_do_not_fit_a_weight_are_refused() -> None:
    told = MADE["int8"]().stored()
    assert told is not None
    with pytest.raises(ValueError, match="do not fit each other, are not in whole 16, or the weight has no numbers"):
        stored_product(torch.ones(3, SHAPE[0]).bfloat16(), told)
    with pytest.raises(ValueError, match="do not fit each other, are not in whole 16, or the weight has no numbers"):
        add_stored_product(torch.ones(2, SHAPE[0]).bfloat16(), torch.ones(3, SHAPE[1]).bfloat16(), told)
    with pytest.raises(ValueError, match="takes contiguous tensors"):
        stored_product(torch.ones(3, SHAPE[1]), told)
    with pytest.raises(ValueError, match="do not fit each other, are not in whole 16, or the weight has no numbers"):
        stored_product(torch.ones(3, SHAPE[1]).bfloat16(), told._replace(codes=0))
    with pytest.raises(ValueError, match="are not in whole 16"):
        stored_product(torch.ones(3, 24).bfloat16(), told._replace(width=24))


def test_both_operators_pass_torch_s_own_checks() -> None:
    told = MADE["nf4 of 64"]().stored()
    assert told is not None
    x, grad = torch.randn(5, SHAPE[1]).bfloat16(), torch.randn(5, SHAPE[0]).bfloat16()
    weight_of = told.owners, told.numbers
    for operator, given in ((STORED_PRODUCT, (x, *weight_of, False)), (STORED_PRODUCT_ADD, (x, grad, *weight_of, True))):
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


def test_a_product_that_is_added_is_rounded_with_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "multiplies", lambda: True)  # also with AMX
    monkeypatch.setattr(choose, "CANDIDATES", {})
    base, grad, to = MADE["int8"](), torch.randn(6, SHAPE[0]).bfloat16(), torch.randn(6, SHAPE[1]).bfloat16()
    exact = to.double() + grad.double() @ by_torch(base).double()
    base.add_matmul_t(to, grad)
    assert float(((to.double() - exact).abs() / exact.abs().clamp_min(1)).max()) < 2**-8  # one rounding to bf16


@pytest.mark.parametrize("bits", [2, 8])
def test_codes_that_c_does_not_know_are_unpacked_as_before(bits: int) -> None:
    base = gptq(sym=True, form="gptq", order="in order", bits=bits)
    assert base.stored() is None
    assert base.matmul(torch.randn(3, SHAPE[1]).bfloat16()).shape == (3, SHAPE[0])


def test_shapes_alone_never_reach_c() -> None:
    with FakeTensorMode():
        told = Nf4Base(SHAPE).stored()
    assert told is not None
    with pytest.raises(ValueError, match="has no numbers"):
        dequantise(told, torch.empty(SHAPE, dtype=torch.bfloat16))


def test_every_type_of_block_has_its_number() -> None:
    assert list(GGUF) == list(BLOCK_TYPES)


def test_a_matrix_of_another_shape_is_refused() -> None:
    told = MADE["int8"]().stored()
    assert told is not None
    with pytest.raises(ValueError, match="does not fit"):
        dequantise(told, torch.empty(SHAPE[1], SHAPE[0], dtype=torch.bfloat16))
