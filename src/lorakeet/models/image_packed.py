"""A denoiser (UNet) with packed linear layers: built empty and filled from its files; the dense one is never in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakeet.errors import DataError, Problems
from lorakeet.formats.safe import SafeFile, open_safetensors
from lorakeet.models.packing import Packing
from lorakeet.models.stock import indexed
from lorakeet.quant.adopt import quantised
from lorakeet.quant.nf4 import missing_kernels
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.spec import QuantSpec

METHODS = ("nf4", "int8")
_NAME = "diffusion_pytorch_model.safetensors"
_WIDE = ("time_embedding", "add_embedding", "time_text_embed")  # few numbers, on which every result depends
Make = Callable[[Mapping[str, Any]], nn.Module]  # a denoiser from the content of its config.json


@dataclass(frozen=True)
class DenoiserFiles:
    """A denoiser as it lies on disk: its configuration, and by diffusers' names the file of each tensor and its name there."""

    where: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[SafeFile, str]]


def packing_of_denoiser(model: nn.Module, spec: QuantSpec) -> Packing:
    """How each linear layer of `model` is packed: all but those that embed timestep and sizes; convolutions stay as they are."""
    if spec.method == "none":
        return {}
    settings = {"method": spec.method, "block_size": spec.block_size, "double_quant": spec.double_quant}
    return {
        path: {**settings, "shape": (module.out_features, module.in_features)}
        for path, module in model.named_modules()
        if type(module) is nn.Linear and path.partition(".")[0] not in _WIDE
    }


def load_packed_denoiser(
    files: DenoiserFiles, make: Make, dtype: torch.dtype, spec: QuantSpec, *, say: Callable[[str], None] = print
) -> nn.Module:
    """The denoiser in `files` on the CPU, its linear layers packed from the dtype of the file.

    All other numbers are rounded to `dtype`. DataError lists every tensor that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = make(files.config)
    packing = packing_of_denoiser(model, spec)
    _check(files, model)
    held = dense = 0
    for name, (file, stored) in files.tensors.items():
        path, _, leaf = name.rpartition(".")
        module, tensor = model.get_submodule(path), file.read(stored)
        if path in packing and leaf == "weight":
            base = quantised(tensor, spec)
            held, dense = held + base.bytes, dense + tensor.numel() * dtype.itemsize
            model.set_submodule(path, PackedLinear(base, getattr(module, "bias", None)))
        elif leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))
        else:
            module._buffers[leaf] = tensor
    say(f"{len(packing)} linear layers are {spec.method}: {held / 1e6:,.1f} MB in place of {dense / 1e6:,.1f} MB.")
    if spec.method == "nf4" and missing_kernels():
        say(missing_kernels())
    return model.requires_grad_(False).eval()


def denoiser_files(folder: Path) -> DenoiserFiles:
    """Those of a folder that diffusers saved (config.json and safetensors), headers checked; nothing is read."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    index = folder / f"{_NAME}.index.json"
    if index.is_file():
        return DenoiserFiles(folder, config, {name: (file, name) for name, file in indexed(index).items()})
    file = open_safetensors(folder / _NAME)
    return DenoiserFiles(folder, config, {name: (file, name) for name in file.tensors})


def _check(files: DenoiserFiles, model: nn.Module) -> None:
    problems = Problems(f"{files.where} does not hold the model that its configuration describes", DataError)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted({*wanted, *files.tensors}):
        file, stored = files.tensors.get(name, (None, ""))
        found = None if file is None else tuple(file.tensors[stored].shape)
        if found != wanted.get(name):
            problems.add(f"'{name}' is {found or 'missing'}; expected {wanted.get(name, 'none')}.")
    problems.raise_if_any()
