"""NF4 weights by bitsandbytes' kernels on a CUDA GPU: dequantised into a given matrix, or multiplied with few tokens as stored.

**Lorakeet has not run on a GPU yet**; its own code for NF4 is as little tried, while thousands run these kernels (MIT). W is
whole in three launches: the block maxima from their codes, their mean, W. It was seven for 2^24 numbers, and a copy. Before the
first use for a dtype, a block size and a width of W, made-up codes of that width are computed by the formula too: rows of several
blocks, and block maxima under several scales. Where these differ by more than rounding, or a kernel does not run, one warning
says so, and torch computes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from lorakeet.kernels.nf4_codes import Nf4Codes
from lorakeet.kernels.proof import difference_found, missing_package
from lorakeet.kernels.triton_support import are_numbers

if TYPE_CHECKING:
    from lorakeet.kernels.protocol import QuantisedWeight, Situation

PACKAGE, VERSIONS = "bitsandbytes", SpecifierSet(">=0.50.2,<0.51")
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NESTED = 256  # block maxima that share one scale
READABLE, NEEDS = "NF4 weights in whole blocks", "NF4 weights in whole blocks, up to 4 tokens"
FEW = 4  # tokens: for more, bitsandbytes may dequantise W into memory of its own
ROWS, BLOCKS = 16, 3 * NESTED - 8  # of made-up codes, at least; blocks are so many that scales of maxima are three
ROUNDINGS = 8  # of a product, relative to its largest number


def why_not(situation: Situation) -> str:
    """Why the kernels do not run in a situation, with the remedy where there is one."""
    if situation.device.type not in DEVICES:
        return "it is a kernel for CUDA GPUs"
    if situation.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16; states are {str(situation.dtype).removeprefix('torch.')}"
    if situation.device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    return missing_package(PACKAGE, VERSIONS)


def takes_matrix(out: Tensor, weight: QuantisedWeight) -> bool:
    """Contiguous `out`, plain buffers."""
    return out.is_contiguous() and out.dtype in DTYPES and are_numbers(out, *weight.packed_buffers())


def takes(x: Tensor, weight: QuantisedWeight) -> bool:
    """Few tokens, plain buffers."""
    return 0 < len(x) <= FEW and x.is_contiguous() and are_numbers(x, *weight.packed_buffers())


def dequantise_into(weight: QuantisedWeight, out: Tensor, first: int) -> bool:
    """Writes the rows of W from `first` on into `out` (rows, in), rounded once; False if it cannot read W."""
    codes = weight.nf4_codes(first, len(out))
    if codes is None or not _agrees(codes, out.dtype, weight.shape[1]):
        return False
    write_blocks(codes, out)
    return True


def quantised_product(weight: QuantisedWeight, x: Tensor, across: bool) -> Tensor | None:
    """x·Wᵀ of x (tokens, in), with sums in fp32; None for x·W, and for a weight whose rows are not whole blocks."""
    codes = None if across else weight.nf4_codes(0, weight.shape[0])
    if codes is None or x.shape[1] % codes.block or not _agrees(codes, x.dtype, x.shape[1]):
        return None
    return few_tokens_product(codes, x, weight.shape)


def add_quantised_product(weight: QuantisedWeight, to: Tensor, x: Tensor, across: bool) -> bool:
    """False: bitsandbytes adds to nothing."""
    return False


def write_blocks(codes: Nf4Codes, out: Tensor) -> None:
    """Writes the numbers of the codes into `out`, contiguous and of as many, rounded once."""
    maxima = codes.absmax
    if codes.scales is not None:
        nested = torch.ops.bitsandbytes.dequantize_blockwise.default
        maxima = nested(codes.absmax, codes.scales, codes.dynamic, NESTED, torch.float32).add_(codes.mean)
    shape = [len(maxima), codes.block]  # rows of one block, whatever those of W are
    torch.ops.bitsandbytes.dequantize_4bit.out(codes.packed, maxima, codes.block, "nf4", shape, out.dtype, out=out.view(shape))


def few_tokens_product(codes: Nf4Codes, x: Tensor, shape: tuple[int, int]) -> Tensor:
    """x·Wᵀ of x (tokens, in) and the codes of W, whose `shape` is (out, in)."""
    nested: dict[str, Any] = {}
    if codes.scales is not None:
        nested = {"absmax_8bit": codes.absmax, "absmax_code": codes.dynamic, "absmax_offset": codes.mean}
    absmax = codes.absmax if codes.scales is None else codes.scales
    found: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(x, codes.packed, shape, absmax, codes.block, "nf4", **nested)
    return found


AGREED: dict[tuple[object, ...], bool] = {}  # by device, dtype, block size, whether maxima have codes, and width


def _agrees(codes: Nf4Codes, dtype: torch.dtype, width: int) -> bool:
    """True if both kernels compute codes like these, in rows of `width` numbers, by the formula; else one warning says how."""
    key = codes.packed.device, dtype, codes.block, codes.scales is not None, width
    if key not in AGREED:

        def compare() -> str:
            import bitsandbytes  # noqa: F401 - it registers its operators

            return _difference(_made_up(codes, width), dtype, width)

        said = difference_found(compare, of_any_kind=True)
        if said:
            logging.getLogger("lorakeet").warning(
                "%s %s. NF4 weights are unpacked by torch's operations, which is slower. Please report it.", PACKAGE, said
            )
        AGREED[key] = not said
    return AGREED[key]


def _made_up(like: Nf4Codes, width: int) -> Nf4Codes:
    """Random codes of whole rows of `width` numbers; no two blocks side by side, and no two scales, are alike."""
    a_row = max(1, -(-width // like.block))
    blocks = a_row * max(ROWS, -(-BLOCKS // a_row))
    draw, device = torch.Generator().manual_seed(0), like.packed.device
    packed = torch.randint(256, (blocks * like.block // 2,), generator=draw, dtype=torch.uint8)
    if like.scales is None:
        return like._replace(packed=packed.to(device), absmax=(torch.rand(blocks, generator=draw) + 0.5).to(device))
    absmax = torch.randint(256, (blocks,), generator=draw, dtype=torch.uint8)
    scales = (torch.arange(-(-blocks // NESTED)) % 3 + 1.0) / 4
    mean = None if like.mean is None else torch.full_like(like.mean, 0.75)
    packed, absmax, scales = (each.to(device) for each in (packed, absmax, scales))
    return like._replace(packed=packed, absmax=absmax, scales=scales, mean=mean)


def _difference(codes: Nf4Codes, dtype: torch.dtype, width: int) -> str:
    """How W, of rows of `width` numbers, or a product differs from the formula by more than rounding; empty if they do not."""
    blocks, width = len(codes.absmax), -(-width // codes.block) * codes.block
    expected = codes.by_formula()
    found = torch.empty(blocks, codes.block, dtype=dtype, device=expected.device)
    write_blocks(codes, found)
    if not torch.allclose(found.float(), expected.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=0.0):
        worst = float((found.float() - expected).abs().max())
        return f"dequantises NF4 otherwise than its formula in {dtype}: the largest difference is {worst:.3g}"
    whole = expected.view(-1, width)
    x = torch.randn(FEW, width, generator=torch.Generator().manual_seed(0)).to(expected.device, dtype)
    product, wanted = few_tokens_product(codes, x, (len(whole), width)).float(), x.float() @ whole.t()
    worst, allowed = float((product - wanted).abs().max()), ROUNDINGS * torch.finfo(dtype).eps * float(wanted.abs().max())
    if worst <= allowed:
        return ""
    return f"multiplies NF4 otherwise than torch in {dtype}: by {worst:.3g}, where rounding explains {allowed:.3g}"
