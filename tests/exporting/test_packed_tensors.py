"""`exporting.packed_tensors`: what packing a weight holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakeet.exporting.packed_tensors import LAYOUTS, bytes_of_packing, packed_part
from lorakeet.formats.files.safetensors_file import open_safetensors
from tiny.held import HeldBytes

# Widths in multiples of 64: with others bitsandbytes 0.50's AVX-512 kernel reads wrong scales.
SIZES: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "qwen2_moe": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "gpt2": {"n_embd": 64, "n_positions": 256},
}



@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_packing_a_weight_holds_what_is_planned(method: str, dtype: torch.dtype, transposed: bool, tmp_path: Path) -> None:
    """Never more; the weight as it was read is counted with what packing makes."""
    weight = torch.randn(1024, 2304).to(dtype)
    save_file({"w": weight}, tmp_path / "one.safetensors")
    layer = Conv1D(2304, 1024) if transposed else nn.Linear(2304, 1024, bias=False)
    part = packed_part("w", open_safetensors(tmp_path / "one.safetensors"), layer, LAYOUTS[method], {})
    with HeldBytes() as held:
        part.make()
    most = held.peak + weight.nbytes  # which torch does not make
    assert most <= bytes_of_packing(weight.numel(), dtype) <= 2.5 * most
