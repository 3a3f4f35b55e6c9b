"""Layouts of packed weights in safetensors files: NF4 as bitsandbytes writes it, int8 and GGUF blocks in layouts of our own.

NF4, the tensors of `x.weight` (n numbers, b blocks), as transformers reads them with bitsandbytes installed:

    x.weight                             uint8 (⌈n/2⌉, 1)    two codes to a byte
    x.weight.absmax                      uint8 (b,)          fp32 without double quantisation, which has no nested_… tensors
    x.weight.quant_map                   fp32 (16,)          the levels
    x.weight.nested_absmax               fp32 (⌈b/256⌉,)     the scales of absmax
    x.weight.nested_quant_map            fp32 (256,)         the levels of absmax
    x.weight.quant_state.bitsandbytes__nf4   uint8           JSON: block sizes, shape, dtype, the mean of absmax

int8 (no other program reads it; config.json says quant_method lorakeet_int8):

    x.weight          int8 (out·in, 1)    row after row. transformers skips an unknown quant_method and would take codes for
    x.weight_scale    fp32 (out,)         weights, but it refuses this shape.  W[r, c] = weight[r·in + c] · weight_scale[r]

GGUF blocks (quant_method lorakeet_gguf: models/files/gguf_packed writes them to the cache from a .gguf file):

    x.weight              uint8 (out, bytes of a row)    the blocks of the file
    x.weight.ggml_type    uint8 (n,)                     the name of their type in ASCII
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import DataError
from lorakeet.quant.gguf import BLOCK_TYPES, GgufBase
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import BLOCK_SIZES, LEVELS, SCALE_BLOCK, Nf4Base, dynamic_levels, nf4_buffer_shapes
from lorakeet.quant.packed import PackedBase

NF4_STATE = ".quant_state.bitsandbytes__nf4"
NF4_PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", NF4_STATE)
NF4_NESTED = (".nested_absmax", ".nested_quant_map")  # absent without double quantisation
INT8_PARTS = ("", "_scale")
INT8_METHOD = "lorakeet_int8"
GGUF_METHOD = "lorakeet_gguf"
GGUF_TYPE = ".ggml_type"
_STATE_BYTES = 320  # the JSON is padded, so that a file's layout is known before its numbers are
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def nf4_shapes(shape: tuple[int, int], *, block_size: int, double_quant: bool) -> Shapes:
    """Dtype and shape of each tensor of an NF4 weight, by the suffix of its name."""
    own = nf4_buffer_shapes(shape, block_size=block_size, double_quant=double_quant)
    found: Shapes = {
        "": (torch.uint8, (*own["packed"][1], 1)),
        ".absmax": own["absmax"],
        ".quant_map": (torch.float32, (len(LEVELS),)),
        NF4_STATE: (torch.uint8, (_STATE_BYTES,)),
    }
    if double_quant:
        found |= {".nested_absmax": own["scales"], ".nested_quant_map": (torch.float32, (256,))}
    return found


def nf4_tensors(base: Nf4Base, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an NF4 weight, by suffix; `dtype` is that of the original weight, to which readers dequantise."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": base.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(base.shape),
    }
    found = {"": base.packed[:, None], ".absmax": base.absmax, ".quant_map": torch.tensor(LEVELS)}
    if base.scales is not None and base.mean is not None:
        state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": base.mean.item()}
        found |= {".nested_absmax": base.scales, ".nested_quant_map": dynamic_levels()}
    text = json.dumps(state).ljust(_STATE_BYTES).encode()
    return {**found, NF4_STATE: torch.tensor(list(text), dtype=torch.uint8)}


def nf4_dtype(state: Tensor) -> torch.dtype:
    """The dtype to which readers dequantise an NF4 weight, from its quant_state; fp32 if it names none."""
    named = json.loads(bytes(state.tolist()).decode("utf-8")).get("dtype", "float32")
    found = getattr(torch, str(named), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32


def nf4_base(name: str, parts: Mapping[str, Tensor]) -> Nf4Base:
    """The base of the tensors of `name`, by suffix. DataError if they are no NF4 weight of a supported kind."""
    try:
        state = json.loads(bytes(parts[NF4_STATE].tolist()).decode("utf-8"))
        shape, block_size = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
        mean = float(state["nested_offset"]) if ".nested_absmax" in parts else None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: its quant_state is not what bitsandbytes writes ({type(error).__name__}: {error}).") from error
    double_quant = mean is not None
    if len(shape) != 2 or block_size not in BLOCK_SIZES or (double_quant and state.get("nested_blocksize") != SCALE_BLOCK):
        raise DataError(f"{name}: NF4 of shape {shape} in blocks of {block_size} is not supported; expected a matrix.")
    if not torch.equal(parts[".quant_map"], torch.tensor(LEVELS)):
        raise DataError(f"{name}: its quant_map holds other levels than NF4's.")
    if double_quant and not torch.equal(parts[".nested_quant_map"], dynamic_levels()):
        raise DataError(f"{name}: its nested_quant_map holds other levels than bitsandbytes' dynamic ones.")
    base = Nf4Base((shape[0], shape[1]), block_size=block_size, double_quant=double_quant)
    found = {"packed": parts[""].contiguous().view(torch.uint8).view(-1), "absmax": parts[".absmax"]}
    if double_quant:
        found |= {"scales": parts[".nested_absmax"], "mean": torch.tensor(mean, dtype=torch.float32)}
    _fill(name, base, found)
    return base


def int8_shapes(shape: tuple[int, int]) -> Shapes:
    """Dtype and shape of each tensor of an int8 weight, by the suffix of its name."""
    return {"": (torch.int8, (shape[0] * shape[1], 1)), "_scale": (torch.float32, (shape[0],))}


def int8_tensors(base: Int8Base) -> dict[str, Tensor]:
    """The tensors of an int8 weight, by suffix."""
    return {"": base.packed.reshape(-1, 1), "_scale": base.scale}


def int8_base(name: str, parts: Mapping[str, Tensor]) -> Int8Base:
    """The base of the tensors of `name`, by suffix; DataError if they are no int8 weight."""
    packed, scale = parts[""], parts["_scale"]
    if packed.dtype != torch.int8 or scale.dim() != 1 or not len(scale) or packed.numel() % len(scale):
        raise DataError(
            f"{name}: it is {packed.dtype} {tuple(packed.shape)} with {scale.numel()} scales; expected int8, as many in each row."
        )
    base = Int8Base((len(scale), packed.numel() // len(scale)))
    _fill(name, base, {"packed": packed.view(base.shape), "scale": scale})
    return base


def gguf_type_tensor(kind: str) -> Tensor:
    """The name of a ggml type as a tensor."""
    return torch.tensor(list(kind.encode("ascii")), dtype=torch.uint8)


def gguf_base(name: str, parts: Mapping[str, Tensor]) -> GgufBase:
    """The base of the blocks of `name`; DataError if they are none."""
    packed, kind = parts[""], bytes(parts[GGUF_TYPE].tolist()).decode("ascii", "replace")
    block = BLOCK_TYPES.get(kind)
    if block is None or packed.dim() != 2 or packed.dtype != torch.uint8 or packed.shape[1] % block.bytes:
        raise DataError(f"{name}: {packed.dtype} {tuple(packed.shape)} is no matrix of {kind} blocks.")
    base = GgufBase((packed.shape[0], packed.shape[1] // block.bytes * block.size), kind)
    _fill(name, base, {"packed": packed})
    return base


def nf4_config(*, block_size: int, double_quant: bool, dense: Iterable[str], dtype: str) -> dict[str, Any]:
    """The quantization_config of an NF4 folder; `dense` are the linear layers that are not quantised."""
    if block_size != 64:
        raise ValueError(f"block_size is {block_size}; bitsandbytes' layout for transformers is in blocks of 64")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(dense),
    }


def int8_config(dense: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of an int8 folder; `dense` are the linear layers that are not quantised."""
    return {"quant_method": INT8_METHOD, "kept": sorted(dense)}


def _fill(name: str, base: PackedBase, tensors: Mapping[str, Tensor]) -> None:
    for part, buffer in base.named_buffers():
        given = tensors[part]
        if given.shape != buffer.shape or given.dtype != buffer.dtype:
            raise DataError(
                f"{name}: its {part} is {given.dtype} {tuple(given.shape)}, expected {buffer.dtype} {tuple(buffer.shape)} "
                f"for {math.prod(base.shape)} weights. Make the quantised model again."
            )
        buffer.copy_(given)
