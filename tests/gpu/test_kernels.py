"""On a GPU every kernel that the table can choose there computes what its definition says, forwards and backwards."""

from __future__ import annotations

import pytest
import torch

from lorakeet.core.base import DenseBase
from lorakeet.core.lowrank import low_rank_linear
from lorakeet.kernels import liger
from lorakeet.kernels.blockwise_rows import BlockwiseRows
from lorakeet.kernels.choose import TABLE, passed_over
from lorakeet.kernels.efficient_varlen import EfficientVarlen
from lorakeet.kernels.flash_varlen import FlashVarlen, by_definition, proved
from lorakeet.kernels.protocol import Situation
from lorakeet.kernels.row_sinks import sinks_proved
from lorakeet.quant.construct import quantise_weight
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import Nf4Base, dequantise_blocks
from lorakeet.quant.spec import QuantSpec

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # those of drivers and compilers are no failures
SHAPE = (384, 512)


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [64, 128, 192])
@pytest.mark.parametrize("groups", [1, 4])
def test_flash_attention_of_packed_rows(real_gpu: torch.device, width: int, groups: int) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("torch's flash kernel needs compute capability 8.0")
    for dtype in (torch.bfloat16, torch.float16):
        assert proved(FlashVarlen, "flash", real_gpu, dtype, (2 * groups, 2, width))


@pytest.mark.parametrize("width", [64, 128, 256])
def test_memory_efficient_attention_of_packed_rows(real_gpu: torch.device, width: int) -> None:
    for dtype in (torch.float32, torch.float16):
        assert proved(EfficientVarlen, "memory-efficient", real_gpu, dtype, (8, 2, width))


@pytest.mark.parametrize("kernel", [FlashVarlen, EfficientVarlen])
def test_sinks_beside_a_kernel(real_gpu: torch.device, kernel: type[FlashVarlen]) -> None:
    """Its log-sums are natural ones, and its backward pass reads them and the result."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("torch's flash kernel needs compute capability 8.0")
    dtypes = (torch.bfloat16, torch.float16) if kernel is FlashVarlen else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        assert sinks_proved(kernel, real_gpu, dtype, (8, 2, 64))


@pytest.mark.parametrize("window", [None, 150])
def test_blocks_of_queries_of_packed_rows(gpu: torch.device, window: int | None) -> None:
    rows, prefix = (5, 300, 70, 1), 140
    q, k, v, grad = (numbers(1, heads, 516, 64, seed=heads).to(gpu) for heads in (8, 2, 2, 8))
    kernel = BlockwiseRows(rows, 64**-0.5, prefix, window)
    out, kept = kernel.forward(q, k, v)
    found = out, *kernel.backward(grad.transpose(1, 2), q, k, v, *kept)
    for mine, theirs in zip(found, by_definition((q, k, v), grad, kernel.laid[:4]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def test_every_task_has_a_kernel_and_reasons(gpu: torch.device, narrow: torch.dtype) -> None:
    for task in TABLE:
        kernel, skipped = passed_over(task, Situation(gpu, narrow, narrow))
        assert kernel.name and all(reason for _, reason in skipped), task


@pytest.mark.parametrize("block", [64, 256])
@pytest.mark.parametrize("double", [False, True])
def test_nf4_comes_back_as_its_formula_says(gpu: torch.device, narrow: torch.dtype, block: int, double: bool) -> None:
    weight = numbers(*SHAPE, seed=1) * 0.02
    base = Nf4Base.of(weight, block_size=block, double_quant=double)
    expected = dequantise_blocks(base.packed, base.block_maxima(0, weight.numel() // block), block).view(SHAPE)
    there = base.to(gpu)
    for dtype in (torch.float32, narrow):
        assert torch.equal(there.dense().to(dtype).cpu(), there.unpack(torch.empty(SHAPE, dtype=dtype, device=gpu), 0).cpu())
        found = there.unpack(torch.empty(SHAPE, dtype=dtype, device=gpu), 0).cpu()
        assert torch.allclose(found.float(), expected.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_a_layer_with_a_pair(gpu: torch.device, narrow: torch.dtype, kind: str, tokens: int) -> None:
    """y and the gradients of x, A and B against fp64 on the CPU, over the weight as it is kept."""
    linear = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False).requires_grad_(False)
    linear.weight.copy_(numbers(*SHAPE, seed=2) * 0.02)
    packed = None if kind == "dense" else quantise_weight(linear.weight, QuantSpec(method=kind)).to(gpu)  # type: ignore[arg-type]
    base = packed or DenseBase(linear.to(gpu, narrow))
    kept = base.dense().double().cpu()
    x, a, b, grad = (numbers(*shape, seed=seed) for seed, shape in
                     enumerate([(tokens, SHAPE[1]), (8, SHAPE[1]), (SHAPE[0], 8), (tokens, SHAPE[0])], 3))  # fmt: skip
    leaves = [each.to(gpu, narrow).requires_grad_() for each in (x, a * 0.05, b * 0.05)]
    y = low_rank_linear(leaves[0], base, (leaves[1], leaves[2], 2.0))
    found = [y, *torch.autograd.grad(y, leaves, grad.to(gpu, narrow))]
    wide = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    expected = wide[0] @ kept.t() + 2.0 * (wide[0] @ wide[1].t()) @ wide[2].t()
    wanted = [expected, *torch.autograd.grad(expected, wide, grad.to(narrow).double())]
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.double().cpu() - theirs).abs().max() <= 8 * torch.finfo(narrow).eps * theirs.abs().max()


def test_int8_products(gpu: torch.device, narrow: torch.dtype) -> None:
    weight, x = numbers(*SHAPE, seed=7) * 0.02, numbers(64, SHAPE[1], seed=8)
    base = Int8Base.of(weight).to(gpu)
    found = base.matmul(x.to(gpu, narrow)).float().cpu()
    expected = x.to(narrow).float() @ base.dense().float().cpu().t()
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("kind", ["norm", "gates", "rotation", "loss"])
def test_ligers_kernels(real_gpu: torch.device, narrow: torch.dtype, kind: str) -> None:
    if why := liger.why_not(Situation(real_gpu, narrow, narrow)):
        pytest.skip(why)
    widths = {"norm": (64, 576, 2048, 4096), "gates": (1536, 8192, 14336), "rotation": (64, 128), "loss": (32000, 49152, 128256)}
    for dtype in (narrow, torch.float32):
        for width in widths[kind]:
            assert liger.computes_the_same(kind, real_gpu, dtype, width), (dtype, width)
