"""Chooses the device and dtypes of a model where the settings say auto."""

from __future__ import annotations

import torch

from lorakeet.core.precision import fastest_products
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.memory.onednn_code import limit_code_cache
from lorakeet.models.nvidia import unusable, unused_gpus
from lorakeet.models.spec import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_BF16 = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")  # features under which a CPU multiplies bfloat16


def device_for(name: str) -> torch.device:
    """Returns the device `name`; auto is CUDA, else Apple's GPU, else the CPU. Raises if it is not here, or too old."""
    if name == "auto":
        if torch.cuda.is_available() and not unusable(0):
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = _named(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            found = f"model.device is '{name}', but torch {torch.__version__} sees {count} CUDA devices here"
            if why := unused_gpus():
                raise EnvironmentProblem(f"{found}. {why}")
            raise EnvironmentProblem(f"{found}; use model.device auto, or install a torch that is built for your GPU.")
        if why := unusable(device.index or 0):
            raise EnvironmentProblem(f"model.device is '{name}', but {why}. Set model.device to cpu, or take another GPU.")
        device = torch.device("cuda", device.index or 0)  # a memory limit needs a device with its number
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise EnvironmentProblem("model.device is 'mps', but torch sees no Apple GPU here; use model.device auto.")
    elif device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"model.device is '{name}'; expected auto, cpu, cuda, cuda:1 or mps.")
    return device


def why_not_cuda(name: str) -> str:
    """Why `auto` takes no NVIDIA GPU though this machine has one, with the remedy; empty where it does, or another is named."""
    if name != "auto":
        return ""
    if torch.cuda.is_available():
        return f"Training runs on the CPU: {why}. Set model.device to cpu to hide this." if (why := unusable(0)) else ""
    why = unused_gpus()
    return f"Training runs on the CPU. {why}" if why else ""


def planned_on(name: str) -> torch.device:
    """Returns the device that a plan for `name` assumes: a CUDA device, even if this machine lacks it, else the CPU."""
    if name != "auto" and _named(name).type == "cuda" and not torch.cuda.is_available():
        return _named(name)
    device = device_for(name)
    return device if device.type == "cuda" else torch.device("cpu")


def _named(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device is '{name}'; expected auto, cpu, cuda, cuda:1 or mps.") from error


def dtype_for(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of the frozen weights; auto is bfloat16 if the device multiplies it natively, else float32.

    A CUDA device that this machine lacks is assumed to: all since 2020 do.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return torch.bfloat16
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and any(torch.cpu.get_capabilities().get(feature) for feature in _CPU_BF16):
        return torch.bfloat16
    return torch.float32


def text_dtype_for(name: str, device: torch.device) -> torch.dtype:
    """The same for text models; auto is float16 on a CUDA device without bfloat16 (T4, RTX 20)."""
    found = dtype_for(name, device)
    return torch.float16 if name == "auto" and device.type == "cuda" and found == torch.float32 else found


def narrow_for(device: torch.device | None) -> str:
    """Returns the 16-bit dtype to recommend for `device`: bfloat16, or float16 on an older CUDA device of this machine."""
    here = device is not None and device.type == "cuda" and torch.cuda.is_available()
    return "bfloat16" if not here or torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def products_for(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype of matrix products over the frozen weights; auto measures (core/precision).

    It runs before every model's first product, so it also limits oneDNN's code cache (memory/onednn_code).
    """
    if device.type == "cpu":
        limit_code_cache()
    return fastest_products(dtype, device) if spec.products == "auto" else DTYPES[spec.products]
