"""NF4 by bitsandbytes' operators gives the formula's numbers; where it would not, it is not used.

Its operators run on the CPU here, which stands for a GPU. The one that writes into a given matrix is for GPUs alone: it is
written out by the operator that makes a new one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.kernels import bitsandbytes_nf4 as kernels
from lorakeet.kernels import choose, proof
from lorakeet.kernels.choose import passed_over
from lorakeet.kernels.protocol import Situation
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import Nf4Base

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = (96, 320)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The CPU stands for a GPU; the calls of the operator that writes into a matrix."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the extra lorakeet[cuda], is not installed")
    import bitsandbytes  # noqa: F401

    calls: list[tuple[Any, ...]] = []

    def into(a: Tensor, absmax: Tensor, block: int, kind: str, shape: list[int], dtype: torch.dtype, out: Tensor) -> None:
        assert out.dtype == dtype and list(out.shape) == shape and absmax.dtype == torch.float32
        calls.append((block, kind, tuple(shape), dtype))
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(a, absmax, block, kind, shape, dtype))

    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("dequantize_4bit.out", into, "CPU")
    monkeypatch.setattr(kernels, "DEVICES", ("cuda", "cpu"))
    kernels.AGREED.clear()
    monkeypatch.setattr(choose, "CANDIDATES", {})
    yield calls
    kernels.AGREED.clear()
    library._destroy()


def base(block: int = 64, *, double: bool = True, shape: tuple[int, int] = SHAPE) -> Nf4Base:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(block)) * 0.02
    return Nf4Base.of(weight, block_size=block, double_quant=double)


def formula(weight: Nf4Base) -> Tensor:
    codes = weight.nf4_codes(0, weight.shape[0])
    assert codes is not None
    return codes.by_formula().view(weight.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block", "double"), [(64, True), (64, False), (32, True)])
def test_whole_weights(gpu: list[Any], block: int, double: bool, dtype: torch.dtype) -> None:
    weight, out = base(block, double=double), torch.full(SHAPE, 7.0, dtype=dtype)
    assert kernels.takes_matrix(out, weight) and kernels.dequantise_into(weight, out, 0)
    assert torch.equal(out, formula(weight).to(dtype)), "to the last bit"
    assert gpu[-1] == (block, "nf4", (SHAPE[0] * SHAPE[1] // block, block), dtype)


def test_rows_of_a_weight(gpu: list[Any]) -> None:
    """From a row on at which a scale of block maxima begins."""
    weight = base(shape=(640, 256))
    first, out = weight.row_step, torch.zeros(128, 256)
    assert first == 64 and kernels.dequantise_into(weight, out, first)
    assert torch.equal(out, formula(weight)[first : first + 128])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
def test_few_tokens_are_multiplied_as_the_weight_is_stored(gpu: list[Any], double: bool, dtype: torch.dtype) -> None:
    weight = base(double=double)
    x = torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    assert kernels.takes(x, weight) and not kernels.takes(x.repeat(2, 1), weight)
    found = kernels.quantised_product(weight, x, False)
    assert found is not None and found.dtype == dtype
    expected = x.double() @ formula(weight).double().t()
    assert (found.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert kernels.quantised_product(weight, x, True) is None, "x·W is not its"
    assert not kernels.add_quantised_product(weight, torch.zeros(3, SHAPE[0]), x, False)


def test_weights_that_it_cannot_read_are_left(gpu: list[Any]) -> None:
    odd = base(shape=(3, 50))  # an incomplete last block
    assert odd.nf4_codes(0, 3) is None and not kernels.dequantise_into(odd, torch.zeros(3, 50), 0)
    other = Int8Base.of(torch.randn(8, 64))
    assert not kernels.dequantise_into(other, torch.zeros(8, 64), 0)
    assert kernels.quantised_product(other, torch.zeros(1, 64), False) is None
    assert not kernels.takes_matrix(torch.zeros(320, 96).t(), base()) and not gpu


def test_a_weight_is_unpacked_by_it(gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the table it stands after kernels that are asked for, and before torch."""
    weight = base()
    expected = weight.unpack_by_torch(torch.zeros(SHAPE), 0)
    assert torch.equal(weight.dense(), expected) and gpu, "C has no part in fp32"
    monkeypatch.setattr(kernels, "DEVICES", ("cuda",))
    monkeypatch.setattr(choose, "CANDIDATES", {})
    gpu.clear()
    assert torch.equal(weight.dense(), expected) and not gpu


@pytest.mark.parametrize("which", ["dequantize_4bit", "gemm_4bit"])
def test_one_that_differs_is_not_used_and_is_said_once(
    which: str, gpu: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "write_blocks" if which == "dequantize_4bit" else "few_tokens_product"
    right = getattr(kernels, name)

    def wrong(codes: Any, out: Tensor, *shape: Any) -> Any:
        found = right(codes, out, *shape)
        (out if found is None else found).mul_(1.1)
        return found

    monkeypatch.setattr(kernels, name, wrong)
    with caplog.at_level(logging.WARNING, logger="lorakeet"):
        for _ in range(2):
            assert not kernels.dequantise_into(base(), torch.zeros(SHAPE), 0)
    (record,) = caplog.records
    assert ("dequantises" if which == "dequantize_4bit" else "multiplies") in record.getMessage()
    assert "NF4 weights are unpacked by torch's operations" in record.getMessage()


FAULTS = ("the first scale for all maxima", "maxima of the first row", "maxima by columns", "the first block of a row")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_one_block_a_row_does_not_show(
    fault: str, dtype: torch.dtype, gpu: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Right for a matrix of a block a row under one scale, and wrong for real ones."""
    write, multiply = kernels.write_blocks, kernels.few_tokens_product

    def written(codes: Any, out: Tensor) -> None:
        assert codes.scales is not None
        write(codes._replace(scales=codes.scales[:1].expand(len(codes.scales)).contiguous()), out)

    def multiplied(codes: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        a_row = shape[1] // codes.block
        if fault == FAULTS[3]:
            x = torch.cat([x[:, : codes.block], torch.zeros_like(x[:, codes.block :])], 1)
        maxima = codes.absmax.view(-1, a_row)
        maxima = maxima[:1].expand(shape[0], a_row) if fault == FAULTS[1] and a_row > 1 else maxima
        maxima = codes.absmax.view(a_row, -1).t() if fault == FAULTS[2] else maxima
        return multiply(codes._replace(absmax=maxima.reshape(-1)), x, shape)

    monkeypatch.setattr(kernels, "write_blocks", written if fault == FAULTS[0] else write)
    monkeypatch.setattr(kernels, "few_tokens_product", multiply if fault == FAULTS[0] else multiplied)
    with caplog.at_level(logging.WARNING, logger="lorakeet"):
        assert not kernels.dequantise_into(base(), torch.zeros(SHAPE, dtype=dtype), 0)
    assert ("dequantises" if fault == FAULTS[0] else "multiplies") in caplog.text


def test_each_width_is_proved(gpu: list[Any]) -> None:
    for rows, width in ((8, 64), (8, 128), (16, 128)):
        assert kernels.dequantise_into(base(shape=(rows, width)), torch.zeros(rows, width), 0)
    assert sorted(key[-1] for key in kernels.AGREED) == [64, 128]


def test_one_that_does_not_run_is_not_used(gpu: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    """As where its library for this CUDA is missing: the operator fails."""
    meta = base().to("meta")
    with caplog.at_level(logging.WARNING, logger="lorakeet"):
        assert not kernels.dequantise_into(meta, torch.zeros(SHAPE, device="meta"), 0)
    assert "does not run: " in caplog.text


def reasons(device: torch.device = CUDA, dtype: torch.dtype = torch.float32) -> list[str]:
    skipped = passed_over("dequantise", Situation(device, dtype, dtype))[1]
    return [why for kernel, why in skipped if kernel.name.startswith("bitsandbytes")]


def test_why_it_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons(CPU) == ["it is a kernel for CUDA GPUs"]
    assert reasons(dtype=torch.float64) == ["takes float32, bfloat16 and float16; states are float64"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reasons() == ["torch sees no CUDA device here"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    install = "Install it with: pip install 'bitsandbytes<0.51,>=0.50.2'"
    proof.missing_package.cache_clear()

    def missing(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", missing)
    assert reasons() == [f"bitsandbytes is not installed. {install}"]
    proof.missing_package.cache_clear()
    monkeypatch.setattr(metadata, "version", lambda _: "0.45.0")
    assert reasons() == [f"bitsandbytes is 0.45.0; expected <0.51,>=0.50.2. {install}"]
    proof.missing_package.cache_clear()
    monkeypatch.setattr(metadata, "version", lambda _: "0.50.2")
    assert not reasons()
    proof.missing_package.cache_clear()
