"""A denoiser built empty and filled from its files, a tensor at a time; its linear layers are packed where asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.errors import DataError, Problems
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
_SHARD = r"(?:-\d+-of-\d+)?"  # older diffusers numbered the files before the variant
_VARIANT = re.compile(rf"[a-z_]+{_SHARD}\.(\w+){_SHARD}\.safetensors")  # model.fp16.safetensors, one file or several
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


def load_denoiser(
    files: DenoiserFiles, make: Make, dtype: torch.dtype, spec: QuantSpec, *, say: Callable[[str], None] = print
) -> nn.Module:
    """The denoiser in `files` on the CPU; where `spec` packs, its linear layers are packed from the dtype of the file.

    All other numbers are rounded to `dtype`. Beside the model no more than one tensor of the file is in memory: diffusers' own
    loader maps the files, whose pages are then resident beside what was made of them. DataError lists every tensor that is
    missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = make(files.config)
    packing = packing_of_denoiser(model, spec)
    _check(files, model)
    for name, (file, stored) in files.tensors.items():
        _place(model, name, file.read(stored), dtype, spec if name.removesuffix(".weight") in packing else None)
    if packing:
        bases = [module.base for module in model.modules() if isinstance(module, PackedLinear)]
        held, dense = sum(base.bytes for base in bases), weights_in(nn.ModuleList(bases)) * dtype.itemsize
        say(f"{len(packing)} linear layers are {spec.method}: {held / 1e6:,.1f} MB in place of {dense / 1e6:,.1f} MB.")
        if spec.method == "nf4" and bitsandbytes_advice():
            say(bitsandbytes_advice())
    return model.requires_grad_(False).eval()


def _place(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, packing: QuantSpec | None) -> None:
    """Puts a tensor of the file where it belongs, in memory of torch's own: what a file was read into begins anywhere."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if packing is not None and leaf == "weight":
        model.set_submodule(path, PackedLinear(quantise_weight(tensor, packing), getattr(module, "bias", None)))
        return
    held = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype).copy_(tensor)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(held, requires_grad=False))
    else:
        module._buffers[leaf] = held


def variant_in(folder: Path, parts: Iterable[str]) -> str | None:
    """The variant, such as fp16, of which alone a pipeline's folder has weights of some part; None where it has those without.

    DataError where there are several to choose from.
    """
    for part in parts:
        files = {path.name for path in (folder / part).glob("*.safetensors")}
        variants = sorted({match[1] for name in files if (match := _VARIANT.fullmatch(name))})
        if not variants or any(_VARIANT.fullmatch(name) is None for name in files):
            continue
        if len(variants) > 1:
            raise DataError(
                f"{folder / part} holds weights of the variants {', '.join(variants)}, and none without; leave one of them there."
            )
        return variants[0]
    return None


def denoiser_files(folder: Path, variant: str | None = None) -> DenoiserFiles:
    """Those of a folder that diffusers saved (config.json and safetensors), headers checked; nothing is read.

    Of a `variant` where the folder has it. DataError where there are none.
    """
    config = read_object(folder / "config.json", expected="the configuration of a UNet or transformer, as diffusers saves it")
    places = [(_NAME, f"{_NAME}.index.json")]
    if variant is not None:
        places.insert(0, (_NAME.replace(".", f".{variant}."), f"{_NAME}.index.{variant}.json"))
    for name, index in places:
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
