"""Kernels of other libraries for a loaded model: what is not installed, and NF4 weights that are decoded together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from lorakeet.kernels import bitsandbytes_nf4, liger
from lorakeet.kernels.nf4_maxima import decoded_bytes
from lorakeet.kernels.proof import missing_package
from lorakeet.kernels.triton_support import has_triton, why_no_launcher
from lorakeet.models import modules
from lorakeet.models.families import Family
from lorakeet.quant.nf4 import Nf4Base, bitsandbytes_advice, decode_maxima_together
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec


def missing_libraries(device: torch.device, quantize: QuantSpec) -> Iterator[str]:
    """Yields what a model on a GPU lacks of the libraries whose kernels come first (kernels/choose), with the command that
    installs it; nothing on other devices. What is said where bitsandbytes is not installed at all is `bitsandbytes_advice`.
    """
    if device.type != "cuda":
        return
    if why := missing_package(liger.PACKAGE, liger.VERSIONS) or (why_no_launcher() if has_triton() else ""):
        yield f"{why}. Until then norms, gates, rotary positions and the loss run by torch's operations, which is slower."
    nf4 = quantize.method == "nf4" and not bitsandbytes_advice()
    if nf4 and (why := missing_package(bitsandbytes_nf4.PACKAGE, bitsandbytes_nf4.VERSIONS)):
        yield f"{why}. Until then NF4 weights are unpacked by torch's operations, which is slower."


def share_block_maxima(model: nn.Module, family: Family) -> None:
    """Lets the NF4 weights of each decoder block decode their block maxima together, where they are on a GPU."""
    for bases in _bases_by_block(model, family):
        decode_maxima_together([base for base in bases if isinstance(base, Nf4Base) and base.device.type == "cuda"])


def shared_maxima_bytes(model: nn.Module, family: Family) -> int:
    """Bytes of the maxima that are decoded at a time there, for a model on shapes."""
    counts = [
        [-(-math.prod(base.shape) // int(base.settings["block_size"])) for base in bases if base.settings.get("double_quant")]
        for bases in _bases_by_block(model, family)
    ]
    return max(map(decoded_bytes, counts), default=0)


def _bases_by_block(model: nn.Module, family: Family) -> Iterator[list[PackedBase]]:
    """The packed weights of each decoder block."""
    prefix, count = modules.block_prefix(model, family)
    for index in range(count):
        block = modules.find(model, f"{prefix}.{index}")
        yield [module.base for module in cast(nn.Module, block).modules() if isinstance(module, PackedLinear)]
