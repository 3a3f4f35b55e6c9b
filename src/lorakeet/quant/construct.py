"""Constructs the frozen base of a weight: quantised by settings, empty to be filled, or the one that a module has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.core.base import FrozenBase
from lorakeet.core.layers import linear
from lorakeet.quant.fp8 import Fp8Base
from lorakeet.quant.gguf import GgufBase
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.mxfp4 import Mxfp4Base
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.pack_quantized import PackQuantizedBase
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec
from lorakeet.quant.stack import PackedStack


def base_of(module: nn.Module, kind: str) -> FrozenBase:
    """The FrozenBase of a linear module of that kind, packed or dense."""
    return module.base if isinstance(module, PackedLinear) else linear.dense_base_of(module, kind)


def quantise_weight(weight: Tensor, spec: QuantSpec) -> PackedBase:
    """`weight` (out, in) quantised by `spec`."""
    if spec.method == "int8":
        return Int8Base.of(weight)
    if spec.method == "nf4":
        return Nf4Base.of(weight, block_size=spec.block_size, double_quant=spec.double_quant)
    raise ValueError(f"method is {spec.method!r}; expected nf4 or int8")


def quantise_stack(weight: Tensor, spec: QuantSpec) -> PackedStack:
    """The matrices of `weight` (count, out, in), each quantised by `spec`."""
    return PackedStack.of(quantise_weight(matrix, spec) for matrix in weight)


def empty_of(shape: tuple[int, ...], spec: QuantSpec) -> PackedBase:
    """What `quantise_weight` makes of a weight of that shape (out, in), with buffers of zeros."""
    more = {"block_size": spec.block_size, "double_quant": spec.double_quant} if spec.method == "nf4" else {}
    return empty_base({"method": spec.method, "shape": shape, **more})


def empty_base(settings: Mapping[str, Any], device: torch.device | str = "cpu") -> PackedBase:
    """A base with the `settings` of `PackedBase.settings` and buffers of zeros, to be filled."""
    out, width = settings["shape"]
    if settings["method"] == "int8":
        return Int8Base((out, width), device=device)
    if settings["method"] == "nf4":
        block_size, double_quant = int(settings["block_size"]), bool(settings["double_quant"])
        return Nf4Base((out, width), block_size=block_size, double_quant=double_quant, device=device)
    if settings["method"] == "gguf":
        return GgufBase((out, width), str(settings["type"]), device=device)
    if settings["method"] == "fp8":
        rows, columns = settings["block"]
        return Fp8Base((out, width), (int(rows), int(columns)), device=device)
    if settings["method"] == "pack-quantized":
        counts = {name: int(settings[name]) for name in ("bits", "groups", "size")}
        return PackQuantizedBase((out, width), **counts, device=device)
    if settings["method"] == "mxfp4":
        return Mxfp4Base((out, width), device=device)
    if settings["method"] == "gptq":
        sizes = {name: int(settings[name]) for name in ("bits", "groups")}
        return GptqBase((out, width), **sizes, sym=settings["sym"], zero_format=settings["zero_format"], device=device)
    raise ValueError(f"method is {settings['method']!r}; expected fp8, gguf, gptq, mxfp4, nf4, int8 or pack-quantized")


def empty_stack(settings: Mapping[str, Any], device: torch.device | str = "cpu") -> PackedStack:
    """A stack with the `settings` of `PackedStack.settings` and buffers of zeros, to be filled."""
    count, *matrix = settings["shape"]
    return PackedStack(empty_base({**settings, "shape": matrix}, device=device), int(count))


def meta_base(base: PackedBase) -> PackedBase:
    """`base` on the meta device: its settings and shapes without numbers."""
    return empty_base(base.settings, device="meta")


def weights_in(module: nn.Module) -> int:
    """The number of frozen and trained weights in `module`; packed ones count as the numbers that they encode."""
    packed = sum(math.prod(base.shape) for base in module.modules() if isinstance(base, (PackedBase, PackedStack)))
    return packed + sum(parameter.numel() for parameter in module.parameters())
