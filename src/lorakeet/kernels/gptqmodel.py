"""GPTQ weights dequantised by GPTQModel's Triton kernel on a CUDA GPU, where that package is installed.

**Lorakeet has not run on a GPU yet**, but thousands run this kernel (Apache 2.0, as the package). W is whole in one launch, where
torch takes some ten passes over it. It comes out by columns: its transpose (in, out) is contiguous.

The kernel's file is read from the installed package without importing that: `import gptqmodel` replaces functions of
transformers, safetensors and Triton, and starts threads. Before the first use for a dtype and a size of W, made-up words are
dequantised by the formula too. Where one number differs, or the kernel does not run, one warning says so, and torch computes.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from lorakeet.kernels.gptq_words import WORD, GptqWords
from lorakeet.kernels.proof import difference_found, missing_package
from lorakeet.kernels.triton_support import are_numbers, has_triton, why_not_compiled

if TYPE_CHECKING:
    from lorakeet.kernels.protocol import QuantisedWeight, Situation

PACKAGE, VERSIONS = "gptqmodel", SpecifierSet(">=7.2,<8")
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
READABLE = "whole GPTQ weights, by columns"
MOST = 1 << 31  # numbers of W: the kernel counts them in 32 bits
FILE = ("nn_modules", "triton_utils", "dequant")  # within the package
_ALONE = "_lorakeet_gptqmodel"  # the package's name while its file is read alone


def why_not(situation: Situation) -> str:
    """Why the kernel does not run in a situation, with the remedy where there is one."""
    if situation.device.type not in DEVICES:
        return "it is a kernel for CUDA GPUs"
    if situation.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16; states are {str(situation.dtype).removeprefix('torch.')}"
    if not has_triton():
        return "Triton is not installed: torch for CUDA on Linux brings it"
    return missing_package(PACKAGE, VERSIONS) or why_not_compiled(situation.device, situation.dtype)


def takes_columns(out: Tensor, weight: QuantisedWeight) -> bool:
    """`out` by columns, plain buffers."""
    plain = are_numbers(out, *weight.packed_buffers())
    return plain and out.t().is_contiguous() and out.dtype in DTYPES and out.numel() < MOST


def reads(weight: QuantisedWeight, dtype: torch.dtype) -> bool:
    """Whether the kernel dequantises a weight in plain buffers to numbers of `dtype`, as it has proved for its size."""
    if not are_numbers(*weight.packed_buffers()) or weight.shape[0] * weight.shape[1] >= MOST:
        return False
    words = weight.gptq_words()
    return words is not None and _agrees(words, dtype)


def dequantise_into(weight: QuantisedWeight, out: Tensor, first: int) -> bool:
    """Writes W into `out` (out, in), rounded once; False for a part of its rows, and for a weight that it cannot read."""
    words = weight.gptq_words() if first == 0 and tuple(out.shape) == weight.shape else None
    if words is None or not _agrees(words, out.dtype):
        return False
    write_transposed(words, out.t())
    return True


def write_transposed(words: GptqWords, out: Tensor) -> None:
    """Writes W transposed into `out` (in, out), contiguous."""
    library = _library()
    bits, numbers = words.bits, out.numel()
    shapes = {"bits": bits, "pack_bits": WORD, "maxq": 2**bits - 1, "out_features": out.shape[1], "num_groups": len(words.scales)}
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        library.dequant_kernel[lambda sizes: (-(-numbers // sizes["X_BLOCK"]),)](
            words.g_idx, words.scales, words.qweight, words.zeros(), out, library.torch_dtype_to_triton(out.dtype), numbers,
            **shapes, **_sizes(library),
        )  # fmt: skip


def _sizes(library: Any) -> dict[str, int]:
    """The sizes of a program, which the kernel brings along before version 7.7."""
    if not hasattr(library, "DEQUANT_X_BLOCK"):
        return {}
    return {name: getattr(library, f"DEQUANT_{name.upper()}") for name in ("X_BLOCK", "num_warps", "num_stages")}


@functools.cache
def _library() -> Any:
    """The file of the kernel as a module, without its package. Errors of any kind if it is another than it was."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"{PACKAGE} has no folder")
    path = Path(found.submodule_search_locations[0]).joinpath(*FILE).with_suffix(".py")
    for name in ("", ".utils", ".utils.torch", ".nn_modules", ".nn_modules.triton_utils"):  # what the file finds around it
        module = sys.modules[_ALONE + name] = ModuleType(_ALONE + name)
        module.__path__ = []
    sys.modules[f"{_ALONE}.utils.torch"].HAS_XPU = False  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location(".".join((_ALONE, *FILE)), path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be read")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


AGREED: dict[tuple[object, ...], bool] = {}  # by device, dtype, bits, groups, rows, and what zero points lack


def _agrees(words: GptqWords, dtype: torch.dtype) -> bool:
    """True if the kernel dequantises words like these by the formula, to the last bit; else one warning says how it differs."""
    groups, rows = words.scales.shape
    key = words.qweight.device, dtype, words.bits, groups, rows, words.less
    if key not in AGREED:
        said = difference_found(lambda: _difference(_made_up(words), dtype), of_any_kind=True)
        if said:
            _warn(said)
        AGREED[key] = not said
    return AGREED[key]


@functools.cache
def _warn(said: str) -> None:
    """One warning for all sizes of weights that differ alike."""
    logging.getLogger("lorakeet").warning(
        "%s %s. GPTQ weights are unpacked by torch's operations, which is slower. Please report it.", PACKAGE, said
    )


def _made_up(like: GptqWords) -> GptqWords:
    """Random words of as many rows and groups, in whose columns every group comes up, in no order."""
    groups, rows = like.scales.shape
    columns = -(-groups // WORD) * WORD
    draw, device = torch.Generator().manual_seed(0), like.qweight.device

    def drawn(*shape: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=draw).to(torch.int32).to(device)

    scales = (torch.rand(groups, rows, generator=draw) + 0.5).half().to(device)
    g_idx = (torch.randperm(columns, generator=draw) % groups).to(torch.int32).to(device)
    qweight, qzeros = drawn(columns * like.bits // WORD, rows), drawn(*like.qzeros.shape)
    return like._replace(qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx)


def _difference(words: GptqWords, dtype: torch.dtype) -> str:
    """How W differs from the formula; empty if it does not."""
    expected = words.by_formula().to(dtype)
    found = torch.empty(expected.shape, dtype=dtype, device=expected.device)
    write_transposed(words, found)
    if torch.equal(found, expected):
        return ""
    worst = float((found.float() - expected.float()).abs().max())
    return f"dequantises GPTQ of {words.bits} bits otherwise than its formula in {dtype}: the largest difference is {worst:.3g}"
