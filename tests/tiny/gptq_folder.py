"""A tiny Llama whose layers are packed in GPTQ of every number of bits and every group size, each layer in another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakeet.quant.gptq import PARTS, GptqBase, ZeroFormat, groups_in_order, quantise_to_nearest
from tiny.models import save_tiny_llama

BITS, SIZES = (2, 3, 4, 8), (32, 64, 128, -1)
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}  # what groups of 128 and 3-bit words divide


def save_mixed_gptq(folder: Path, zero_format: ZeroFormat) -> dict[str, dict[str, Any]]:
    """Writes the folder; returns the settings of each layer, by path. Layers take turns: symmetric or not, desc_act or not."""
    save_tiny_llama(folder, **WIDE)
    tensors = load_file(folder / "model.safetensors")
    weights = [name for name in sorted(tensors) if name.endswith("proj.weight")]
    settings: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(weights):
        bits, size = BITS[number % 4], SIZES[number // 4 % 4]
        own = {"bits": bits, "group_size": size, "sym": number % 3 > 0, "desc_act": number % 2 > 0}
        path = name.removesuffix(".weight")
        settings[path] = own
        tensors |= {f"{path}.{part}": tensor for part, tensor in _packed(tensors.pop(name), own, zero_format).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    words = {"quant_method": "gptq", **settings[next(iter(settings))], "checkpoint_format": zero_format}
    dynamic = {path.replace(".", r"\."): own for path, own in settings.items()}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {**words, "dynamic": dynamic}}))
    return settings


def _packed(weight: Tensor, own: dict[str, Any], zero_format: ZeroFormat) -> dict[str, Tensor]:
    columns = weight.shape[1]
    g_idx = groups_in_order(columns, own["group_size"])
    if own["desc_act"]:
        g_idx = g_idx[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    codes, grid = quantise_to_nearest(weight, own["bits"], own["sym"], g_idx, int(g_idx.max()) + 1)
    base = GptqBase.of(codes, grid, bits=own["bits"], sym=own["sym"], zero_format=zero_format)
    return {part: base.get_buffer(part) for part in PARTS}
