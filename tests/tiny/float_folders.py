"""Model folders in FP8, int8, int4 and MXFP4 with scales, as other programs publish them, made of small dense ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakeet.quant.fp8 import Block, Fp8Base
from lorakeet.quant.mxfp4 import LEVELS


def fp8_folder(source: Path, out: Path, *, block: Block | None = (16, 32), method: str = "fp8") -> Path:
    """Every matrix of a block's layers in FP8, with a scale for each block of numbers, for the whole (None), or by rows."""
    mark = {"fp8": "_scale_inv", "compressed-tensors": "_scale"}[method]
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if ".layers." in name and name.endswith("weight") and weight.dim() == 2 and ".gate." not in name:  # a router
            shape = (weight.shape[0], weight.shape[1])
            base = Fp8Base(shape, block or shape)
            base.store(weight)
            tensors |= {name: base.packed.view(torch.float8_e4m3fn), name + mark: base.scale if block else base.scale.reshape(1)}
            tensors[f"{name.removesuffix('.weight')}.activation_scale"] = torch.ones(())
        else:
            tensors[name] = weight
    settings: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": list(block) if block else None}
    if method != "fp8":
        weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": list(block or ())}
        settings = {"quant_method": method, "format": "float-quantized", "config_groups": {"group_0": {"weights": weights}}}
    return written(source, out, tensors, settings)


def int8_folder(source: Path, out: Path) -> Path:
    """Every matrix of a block's layers in int8 with a scale a row, as compressed-tensors writes it."""
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if ".layers." in name and weight.dim() == 2 and ".gate." not in name:  # a router
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors |= {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}
        else:
            tensors[name] = weight
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    return written(source, out, tensors, {**settings, "config_groups": {"group_0": {"weights": weights}}})


def words_folder(source: Path, out: Path, *, size: int = 16, symmetric: bool = True) -> Path:
    """Every matrix of a block's layers in four bits, in compressed-tensors' words, with bf16 scales by group."""
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if ".layers." not in name or weight.dim() != 2 or ".gate." in name:  # a router
            tensors[name] = weight
            continue
        grouped = weight.view(len(weight), -1, size)
        low, high = (grouped.amin(2), grouped.amax(2)) if not symmetric else (-grouped.abs().amax(2), grouped.abs().amax(2))
        scale = ((high - low) / 15).bfloat16()
        points = (-8 - low / scale.float()).round().clamp(-8, 7).long() if not symmetric else torch.zeros_like(scale).long()
        values = ((grouped / scale.float()[..., None]).round() + points[..., None]).clamp(-8, 7).long().view(weight.shape)
        tensors |= {f"{name}_packed": in_words(values + 8), f"{name}_scale": scale, f"{name}_shape": torch.tensor(weight.shape)}
        if not symmetric:
            tensors[f"{name}_zero_point"] = in_words((points + 8).T).T
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size, "symmetric": symmetric}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return written(source, out, tensors, {**settings, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})


def in_words(codes: Tensor) -> Tensor:
    """Codes of four bits (rows, columns), eight to an int32, the first in the lowest bits."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).view(len(codes), -1, 8)
    whole = (padded << (4 * torch.arange(8))).sum(2)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def mxfp4_folder(source: Path, out: Path) -> Path:
    """The experts of a small gpt-oss in MXFP4: random codes and scales near one."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")) and weight.dim() == 3:
            count, width, rows = weight.shape
            blocks = torch.randint(0, 256, (count, rows, width // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(121, 125, (count, rows, width // 32), dtype=torch.uint8, generator=generator)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = weight
    return written(source, out, tensors, {"quant_method": "mxfp4"})


def by_hand(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 number by number: (experts, rows, groups, 16) and (experts, rows, groups) to (experts, rows, columns)."""
    found = torch.empty(*blocks.shape[:2], blocks.shape[2] * 32)
    for expert, row, group, byte in torch.cartesian_prod(*(torch.arange(size) for size in blocks.shape)).tolist():
        code, factor = int(blocks[expert, row, group, byte]), 2.0 ** (int(scales[expert, row, group]) - 127)
        found[expert, row, group * 32 + 2 * byte] = LEVELS[code % 16] * factor
        found[expert, row, group * 32 + 2 * byte + 1] = LEVELS[code // 16] * factor
    return found


def written(source: Path, out: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    """The folder with these tensors, and the settings of their quantisation in config.json."""
    shutil.copytree(source, out)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return out
