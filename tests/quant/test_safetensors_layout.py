"""The layouts on disk: bitsandbytes reads ours and we read its own; what does not fit is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lorakeet.errors import DataError
from lorakeet.quant import nf4, safetensors_layout
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import Nf4Base

WEIGHT = torch.randn(12, 128, generator=torch.Generator().manual_seed(0))


def their_parts(double_quant: bool) -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes itself saves for WEIGHT."""
    assert nf4.has_bitsandbytes(torch.device("cpu"))
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(WEIGHT, compress_statistics=double_quant, quant_type="nf4")
    return {"": packed, **{f".{key}": value for key, value in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_reads_what_we_write(double_quant: bool) -> None:
    base = Nf4Base.of(WEIGHT, double_quant=double_quant)
    parts = safetensors_layout.nf4_tensors(base, torch.float32)
    shapes = safetensors_layout.nf4_shapes((12, 128), block_size=64, double_quant=double_quant)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()} == shapes
    assert nf4.has_bitsandbytes(torch.device("cpu"))
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState.from_dict({f"weight{name}": parts[name] for name in parts if name}, torch.device("cpu"))
    assert torch.equal(dequantize_4bit(parts[""], state), base.dense())


@pytest.mark.parametrize("double_quant", [True, False])
def test_we_read_what_bitsandbytes_writes(double_quant: bool) -> None:
    found = safetensors_layout.nf4_base("w", their_parts(double_quant))
    assert torch.equal(found.dense(), Nf4Base.of(WEIGHT, double_quant=double_quant).dense())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (safetensors_layout.NF4_STATE, lambda t: t[:20], "quant_state"),
        (".quant_map", lambda t: t * 2, "other levels than NF4's"),
        (".nested_quant_map", lambda t: t * 2, "nested_quant_map"),
        (".absmax", lambda t: t[1:], r"absmax is torch.uint8 \(23,\), expected torch.uint8 \(24,\)"),
        ("", lambda t: t[1:], "packed is"),
    ],
)
def test_a_damaged_weight_is_named(part: str, change: Any, message: str) -> None:
    parts = their_parts(True)
    parts[part] = change(parts[part])
    with pytest.raises(DataError, match=f"some.weight: .*{message}"):
        safetensors_layout.nf4_base("some.weight", parts)


def test_blocks_and_shapes_beyond_the_layout_are_refused() -> None:
    parts = their_parts(True)
    state = {**json.loads(bytes(parts[safetensors_layout.NF4_STATE].tolist())), "shape": [2, 3, 256]}
    parts[safetensors_layout.NF4_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(DataError, match="expected a matrix"):
        safetensors_layout.nf4_base("w", parts)
    with pytest.raises(ValueError, match="blocks of 64"):
        safetensors_layout.nf4_config(block_size=32, double_quant=True, dense=(), dtype="float32")


def test_int8_there_and_back() -> None:
    base = Int8Base.of(WEIGHT)
    parts = safetensors_layout.int8_tensors(base)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()} == safetensors_layout.int8_shapes(
        (12, 128)
    )
    assert torch.equal(safetensors_layout.int8_base("w", parts).dense(), base.dense())
    with pytest.raises(DataError, match="w: it is"):
        safetensors_layout.int8_base("w", {**parts, "": WEIGHT})
    with pytest.raises(DataError, match="with 5 scales"):
        safetensors_layout.int8_base("w", {**parts, "_scale": torch.zeros(5)})
    with pytest.raises(DataError, match="scale is"):
        safetensors_layout.int8_base("w", {**parts, "_scale": torch.zeros(12).half()})
