"""Whether Triton kernels of other libraries run: on an NVIDIA GPU, with what compiles their launcher. Does not import Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

CAPABILITY = (8, 0)  # of a GPU, at least, for bf16 on tensor cores
LIBRARIES = (7, 5)  # for other dtypes
_LAUNCHER = "Triton compiles what launches its kernels, and there is"
NUMBERS = (Tensor, nn.Parameter)  # not the tensors of a trace, nor sharded ones


def are_numbers(*tensors: Tensor) -> bool:
    """True unless one of the tensors belongs to a trace or is sharded."""
    return all(type(tensor) in NUMBERS for tensor in tensors)


def why_not_compiled(device: torch.device, dtype: torch.dtype) -> str:
    """Why such kernels cannot run on `device` on states of `dtype`."""
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
