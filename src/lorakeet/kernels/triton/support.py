"""Whether Triton kernels run: only on request, on an NVIDIA GPU since 2020 or in Triton's interpreter. Does not import Triton.

**Not run on a GPU yet**: the kernels were run by Triton's interpreter and compiled for GPUs that were not available. So they are
used on request only, after a proof on the model's own device (models/kernels).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakeet.kernels.protocol import QuantisedWeight, Situation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # of a GPU, at least: bf16 on tensor cores, and what the kernels were compiled for
LIBRARIES = (7, 5)  # for Triton kernels of other libraries, at least; for bf16 it is CAPABILITY
RANK = 64  # the highest that runs within a product: tiles of A and B must fit into shared memory beside those of x and W
_LAUNCHER = "Triton compiles what launches its kernels, and there is"
NUMBERS = (Tensor, nn.Parameter)  # not the tensors of a trace, nor sharded ones


def why_not_on(device: torch.device) -> str:
    """Why Triton kernels cannot run on `device`, and the remedy; empty if they can."""
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"Triton kernels run on CUDA devices, and this model is on '{device}'. Set model.kernels to torch."
    if not has_triton():
        if sys.platform != "linux":
            return "Triton is there for Linux only. Set model.kernels to torch."
        return (
            "Triton is not installed: torch for CUDA on Linux brings it. Install it with: pip install triton, or set "
            "model.kernels to torch."
        )
    return _why_not_gpu(device) if device.type == "cuda" else ""


def why_not(situation: Situation) -> str:
    """Why Triton kernels do not run in a situation."""
    if not situation.triton:
        return "not requested (model.kernels is torch)"
    if situation.dtype not in DTYPES:
        return f"takes {', '.join(map(_named, DTYPES))}; states are {_named(situation.dtype)}"
    return why_not_on(situation.device)


def are_numbers(*tensors: Tensor) -> bool:
    """True unless one of the tensors belongs to a trace or is sharded."""
    return all(type(tensor) in NUMBERS for tensor in tensors)


def takes_rows(x: Tensor, weight: QuantisedWeight) -> bool:
    """Products: few rows."""
    return weight.kernels is not None and 0 < len(x) <= weight.kernels.tokens and are_numbers(x)


def takes_pair(x: Tensor, weight: QuantisedWeight, A: Tensor, B: Tensor) -> bool:
    """Products with a pair: few rows, a low rank, all in one dtype."""
    return takes_rows(x, weight) and len(A) <= RANK and A.dtype == B.dtype == x.dtype and are_numbers(A, B)


def takes_tiles(out: Tensor, weight: QuantisedWeight) -> bool:
    """Dequantisation: contiguous `out`, plain buffers."""
    return out.is_contiguous() and are_numbers(out, *weight.packed_buffers())


def _why_not_gpu(device: torch.device) -> str:
    """Why they cannot run on a GPU: they were compiled for NVIDIA's since 2020 alone."""
    if torch.version.hip:
        found = f"this torch is for AMD GPUs (ROCm {torch.version.hip})"
    else:
        capability = _capability(torch.cuda.current_device() if device.index is None else device.index)
        if capability >= CAPABILITY:
            lacking = why_no_launcher()
            return f"{lacking}, or set model.kernels to torch." if lacking else ""
        found = f"this GPU has {capability[0]}.{capability[1]}"
    least = ".".join(map(str, CAPABILITY))
    return f"Triton kernels need an NVIDIA GPU of compute capability {least} or higher; {found}. Set model.kernels to torch."


def why_not_compiled(device: torch.device, dtype: torch.dtype) -> str:
    """Why the Triton kernels of other libraries, which are tried on more GPUs, cannot run on `device` on states of `dtype`."""
    if device.type != "cuda":
        return ""  # in the tests Triton's interpreter stands for a GPU
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    if torch.version.hip:
        return f"this torch is for AMD GPUs (ROCm {torch.version.hip})"
    least = CAPABILITY if dtype == torch.bfloat16 else LIBRARIES
    found = torch.cuda.get_device_capability(device)
    if found < least:
        return f"needs compute capability {least[0]}.{least[1]}; this GPU has {found[0]}.{found[1]}"
    return why_no_launcher()


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def has_triton() -> bool:
    """True if the package is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def why_no_launcher() -> str:
    """Why Triton cannot compile what launches its kernels, with the remedy and no full stop; empty if it can.

    It takes CC, else gcc or clang, and Python's headers (triton/runtime/build.py, _find_compiler and _build). Images that only
    run programs often have neither.
    """
    named = os.environ.get("CC")
    if not any(map(shutil.which, ("gcc", "clang") if named is None else (named,))):
        found = "no C compiler" if named is None else f"CC, which is '{named}', and no such program"
        return f"{_LAUNCHER} {found}. Install gcc (on Debian: apt install gcc), or set CC to it"
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not (Path(folder) / "Python.h").is_file():
        return f"{_LAUNCHER} no Python.h in {folder}. Install it (on Debian: apt install python3-dev)"
    return ""


def _interpreted() -> bool:
    """True if Triton interprets its kernels on the CPU (its own switch TRITON_INTERPRET), as the tests do."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
