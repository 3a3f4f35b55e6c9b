"""Loads a denoiser from its files, a tensor at a time, and packs its linear layers if requested."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.errors import DataError, Problems
from lorakeet.evaluate.wording import bytes_text
from lorakeet.formats.files.json_object import read_object
from lorakeet.formats.files.safetensors_file import SafeFile, open_safetensors
from lorakeet.models.files.packing import Packing
from lorakeet.models.files.stored_tensors import indexed_tensors
from lorakeet.quant.construct import quantise_weight, weights_in
from lorakeet.quant.nf4 import bitsandbytes_advice
from lorakeet.quant.packed import PackedLinear
from lorakeet.quant.spec import QuantSpec

METHODS = ("nf4", "int8")
_NAME = "diffusion_pytorch_model.safetensors"
_SHARD = r"(?:-\d+-of-\d+)?"  # older diffusers versions put the number before the variant
_VARIANT = re.compile(rf"[a-z_]+{_SHARD}\.(\w+){_SHARD}\.safetensors")  # model.fp16.safetensors, one file or several
_WIDE = ("time_embedding", "add_embedding", "time_text_embed")  # few weights, on which every result depends
Make = Callable[[Mapping[str, Any]], nn.Module]  # a denoiser from the content of its config.json


@dataclass(frozen=True)
class DenoiserFiles:
    """A denoiser on disk: its configuration, and by diffusers' names the file of each tensor and its name there."""

    where: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[SafeFile, str]]


def packing_of_denoiser(model: nn.Module, spec: QuantSpec) -> Packing:
    """Returns the packing of each linear layer of `model`, but those that embed timestep and sizes."""
    if spec.method == "none":
        return {}
    settings = {"method": spec.method, "block_size": spec.block_size, "double_quant": spec.double_quant}
    return {
        path: {**settings, "shape": (module.out_features, module.in_features)}
        for path, module in model.named_modules()
        if type(module) is nn.Linear and path.partition(".")[0] not in _WIDE
    }


def load_denoiser(
    files: DenoiserFiles, make: Make, dtype: torch.dtype, spec: QuantSpec, *, say: Callable[[str], None] = print
) -> nn.Module:
    """Loads the denoiser of `files` on the CPU; linear layers that `spec` packs are packed from the dtype of the file.

    Other weights are rounded to `dtype`. At most one tensor of the file is in memory beside the model: diffusers' own loader maps
    the files, whose pages are then resident too. DataError lists every tensor that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = make(files.config)
    packing = packing_of_denoiser(model, spec)
    _check(files, model)
    for name, (file, stored) in files.tensors.items():
        _set_tensor(model, name, file.read(stored), dtype, spec if name.removesuffix(".weight") in packing else None)
    if packing:
        bases = [module.base for module in model.modules() if isinstance(module, PackedLinear)]
        packed, dense = sum(base.bytes for base in bases), weights_in(nn.ModuleList(bases)) * dtype.itemsize
        say(f"{len(packing)} linear layers are {spec.method}: {bytes_text(packed)} in place of {bytes_text(dense)}.")
        if spec.method == "nf4" and bitsandbytes_advice():
            say(bitsandbytes_advice())
    return model.requires_grad_(False).eval()


def _set_tensor(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, packing: QuantSpec | None) -> None:
    """Sets a tensor of the model, copied into memory that torch aligns."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if packing is not None and leaf == "weight":
        model.set_submodule(path, PackedLinear(quantise_weight(tensor, packing), getattr(module, "bias", None)))
        return
    copy = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype).copy_(tensor)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(copy, requires_grad=False))
    else:
        module._buffers[leaf] = copy


def variant_in(folder: Path, parts: Iterable[str]) -> str | None:
    """Returns the variant, such as fp16, if a pipeline's folder has weights of some part only in it; else None.

    Raises DataError if there are several to choose from.
    """
    for part in parts:
        files = {path.name for path in (folder / part).glob("*.safetensors")}
        variants = sorted({match[1] for name in files if (match := _VARIANT.fullmatch(name))})
        if not variants or any(_VARIANT.fullmatch(name) is None for name in files):
            continue
        if len(variants) > 1:
            raise DataError(
                f"{folder / part} has weights of the variants {', '.join(variants)}, and none without; leave one of them there."
            )
        return variants[0]
    return None


def denoiser_files(folder: Path, variant: str | None = None) -> DenoiserFiles:
    """Returns the files of a folder that diffusers saved (config.json and safetensors), of a `variant` if it has one.

    It checks headers and reads no tensors. Raises DataError if there are none.
    """
    config = read_object(folder / "config.json", expected="the configuration of a UNet or transformer, as diffusers saves it")
    names = [(_NAME, f"{_NAME}.index.json")]
    if variant is not None:
        names.insert(0, (_NAME.replace(".", f".{variant}."), f"{_NAME}.index.{variant}.json"))
    for name, index in names:
        if (folder / index).is_file():
            return DenoiserFiles(folder, config, {key: (file, key) for key, file in indexed_tensors(folder / index).items()})
        if (folder / name).is_file():
            break
    file = open_safetensors(folder / name)
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
