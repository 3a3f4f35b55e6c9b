"""Kernels of other libraries that a loaded model lacks, since they are not installed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorakeet.kernels import bitsandbytes_nf4, liger
from lorakeet.kernels.proof import missing_package
from lorakeet.kernels.triton_support import has_triton, why_no_launcher
from lorakeet.quant.nf4 import bitsandbytes_advice
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
