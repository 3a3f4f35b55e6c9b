"""GPTQModel's kernel gives the bits of torch's unpacking; where it would not, it is not used.

Triton's interpreter runs it on the CPU, which stands for a GPU.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.core.scratch import SCRATCH
from lorakeet.kernels import choose, proof
from lorakeet.kernels import gptqmodel as kernels
from lorakeet.kernels.choose import dequantised_by_columns, passed_over
from lorakeet.kernels.cpu.operators import torch_only
from lorakeet.kernels.protocol import Situation
from lorakeet.quant.int8 import Int8Base
from tiny.gptq_base import base
from tiny.triton_device import behave_like_a_card, needs_triton

pytestmark = needs_triton
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
INSTALLED = Path(sys.prefix) / "gptqmodel"  # by `make install`
KINDS = [(bits, kind) for bits in (2, 4, 8) for kind in ("gptq", "gptq_v2")] + [(3, "gptq_v2")]


def forget() -> None:
    """Nothing of it is known: what was proved, what was chosen, whether it is installed."""
    kernels.AGREED.clear()
    kernels._library.cache_clear()
    kernels._warn.cache_clear()
    proof.missing_package.cache_clear()
    choose.CANDIDATES.clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """The CPU stands for a GPU, and the package is found; the dtype of each matrix that the kernel wrote."""
    if not INSTALLED.is_dir():
        pytest.skip(f"gptqmodel is not in {INSTALLED}: make install puts it there")
    behave_like_a_card(monkeypatch)
    forget()
    monkeypatch.syspath_prepend(INSTALLED)
    monkeypatch.setattr(kernels, "DEVICES", ("cuda", "cpu"))
    written: list[torch.dtype] = []
    write = kernels.write_transposed

    def noted(words: Any, out: Tensor) -> None:
        written.append(out.dtype)
        write(words, out)

    monkeypatch.setattr(kernels, "write_transposed", noted)
    yield written
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize(("bits", "kind"), KINDS)
def test_whole_weights(gpu: list[torch.dtype], bits: int, kind: Any, dtype: torch.dtype) -> None:
    weight = base(bits, kind)
    out = torch.full((128, 96), 7.0, dtype=dtype).t()
    assert kernels.takes_columns(out, weight) and kernels.reads(weight, dtype) and kernels.dequantise_into(weight, out, 0)
    assert torch.equal(out, weight.unpack_by_torch(torch.zeros(weight.shape, dtype=dtype), 0)), "to the last bit"
    assert gpu == [dtype, dtype], "proved once"
    assert not [name for name in sys.modules if name.partition(".")[0] == "gptqmodel"], "the package was not imported"


def test_a_product_uses_it_in_the_shared_matrix(gpu: list[torch.dtype]) -> None:
    """Forward, backward, and added to a sum; the shared matrix has the weight by columns, and is as large as before."""
    weight = base(4)
    draw = torch.Generator().manual_seed(1)
    x, grad = torch.randn(5, 128, generator=draw), torch.randn(5, 96, generator=draw)
    dense = weight.unpack_by_torch(torch.zeros(weight.shape), 0)
    SCRATCH.clear()
    with torch_only():
        assert dequantised_by_columns(weight, torch.float32, CPU)
        gpu.clear()
        to = torch.ones(5, 128)
        weight.add_matmul_t(to, grad)
        torch.testing.assert_close(weight.matmul(x), x @ dense.t())
        torch.testing.assert_close(weight.matmul_t(grad), grad @ dense)
        torch.testing.assert_close(to, grad @ dense + 1)
    assert len(gpu) == 3 and [buffer.numel() for buffer in SCRATCH._buffers.values()] == [96 * 128]


def test_weights_that_it_cannot_read_are_left(gpu: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    other = Int8Base.of(torch.randn(8, 64))
    assert not kernels.reads(other, torch.float32) and not kernels.dequantise_into(other, torch.zeros(64, 8).t(), 0)
    assert not kernels.reads(base(3), torch.float32)
    monkeypatch.setattr(kernels, "MOST", 96 * 128)
    assert not kernels.reads(base(4), torch.float32) and not kernels.takes_columns(torch.zeros(128, 96).t(), base(4))
    assert not gpu


@pytest.mark.parametrize("fault", ["scales of the first group", "groups in order", "one number"])
def test_one_that_differs_is_not_used_and_is_said_once(
    fault: str, gpu: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = kernels.write_transposed

    def wrong(words: Any, out: Tensor) -> None:
        if fault == "scales of the first group":
            words = words._replace(scales=words.scales[:1].expand_as(words.scales).contiguous())
        if fault == "groups in order":
            words = words._replace(g_idx=words.g_idx.sort().values)
        right(words, out)
        if fault == "one number":
            out[-1, -1] += 1

    monkeypatch.setattr(kernels, "write_transposed", wrong)
    weight = base(4)
    with caplog.at_level(logging.WARNING, logger="lorakeet"), torch_only():
        for _ in range(2):
            assert not dequantised_by_columns(weight, torch.float32, CPU)
            assert torch.equal(weight.dense(), weight.unpack_by_torch(torch.zeros(weight.shape), 0))
    (record,) = caplog.records
    assert "dequantises GPTQ of 4 bits otherwise" in record.getMessage() and "unpacked by torch's" in record.getMessage()


def test_a_package_without_the_kernel_is_said(
    gpu: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "FILE", ("nn_modules", "triton_utils", "moved"))
    with caplog.at_level(logging.WARNING, logger="lorakeet"):
        for shape in ((96, 128), (32, 128)):
            assert not kernels.reads(base(4, shape=shape), torch.float32)
    (record,) = caplog.records
    assert "does not run: FileNotFoundError" in record.getMessage()


def test_why_it_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def reasons(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        found = {kernel.name: why for kernel, why in passed_over("dequantise", Situation(device, dtype, dtype, c=False))[1]}
        return found["GPTQModel: dequant_kernel"]

    monkeypatch.setattr(kernels, "missing_package", lambda name, versions: f"{name} is not installed")
    assert reasons(CPU) == "it is a kernel for CUDA GPUs"
    assert "states are float64" in reasons(CUDA, torch.float64)
    assert reasons(CUDA) == "gptqmodel is not installed"
    monkeypatch.setattr(kernels, "missing_package", lambda name, versions: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reasons(CUDA) == "torch sees no CUDA device here"
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert "Triton is not installed" in reasons(CUDA)
