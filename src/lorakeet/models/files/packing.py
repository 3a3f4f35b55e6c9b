"""Determines how each linear layer of a model is packed, from settings, config.json and file headers; reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from lorakeet.core.layers.experts import stack_shape
from lorakeet.errors import ConfigError
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.models import modules
from lorakeet.models.files import float_scales
from lorakeet.models.files.gguf_packed import packed_types
from lorakeet.models.files.joined_experts import joined_stacks
from lorakeet.models.files.quantized import owners, packable, packable_stacks, targets_of
from lorakeet.models.files.stored_tensors import method_of, stored_quantisation, tensor_files
from lorakeet.quant import gptq_config, safetensors_layout
from lorakeet.quant.spec import QuantSpec

# Path of a layer, or of a stack of experts → arguments of quant/construct.empty_base or empty_stack, such as method and shape.
Packing = Mapping[str, Mapping[str, Any]]


def packing_of(model: nn.Module, config: Any, spec: QuantSpec, files: Path | None = None) -> Packing:
    """Returns the packed layers of `model`, which `config` describes, quantised as `spec` says or as its files already are.

    `files` is the model's folder or .gguf file, if there is one. Without it, a packed model is assumed to have every linear layer
    but the head packed as its config.json says. Raises ConfigError if that is not enough.
    """
    stored = stored_quantisation(config)
    if spec.method == "gguf" and not stored:
        return _gguf_file(model, files)
    method = method_of(stored) if stored else spec.method
    if method == "none":
        return {}
    there = tensor_files(files) if stored and files is not None and any(files.glob("*.safetensors")) else {}
    if method == float_scales.MXFP4 and stored:
        return _stacks_in(model, there, stored)
    chosen = _packed_in(model, there) if there else packable(model, head=not stored and spec.head == "quantize")
    found: dict[str, Mapping[str, Any]] = {}
    where = str(files / "config.json") if files is not None and files.is_dir() else "config.json"
    gptq = gptq_config.parse(stored, where) if stored and method == gptq_config.METHOD else None
    settings: Mapping[str, Any]
    scaled = {float_scales.dense_name(name): None for name in there} if method in float_scales.SCALE else {}
    names = {path: name for name, path in owners(model, scaled).items()}
    for path, module in chosen.items():
        shape = modules.weight_shape(module, cast(Any, modules.kind_of(module)))
        if gptq is not None:
            own = gptq.for_layer(path)
            if own is None:
                continue
            settings = {"bits": own.bits, "groups": own.groups(shape[1]), "sym": own.sym, "zero_format": own.zero_format}
        elif stored and method == "gguf":
            settings = {"type": _types_in(there, path)}
        elif stored and method in float_scales.SCALE:
            settings = float_scales.scaled_settings(there, names.get(path, f"{path}.weight"), shape, stored)
        else:
            double = bool(stored.get("bnb_4bit_use_double_quant", False)) if stored else spec.double_quant
            settings = {"block_size": spec.block_size, "double_quant": double}
        found[path] = {"method": method, **settings, "shape": shape}
    if stored and method in float_scales.SCALE:
        found |= _stacks_in(model, there, stored)
    elif not stored:
        how = {"method": method, "block_size": spec.block_size, "double_quant": spec.double_quant}
        for path, module in packable_stacks(model).items():
            found[path] = {**how, "shape": stack_shape(module, path.rpartition(".")[2])}
    return found


def _gguf_file(model: nn.Module, files: Path | None) -> Packing:
    if files is None or files.suffix.lower() != ".gguf":
        raise ConfigError("model.quantize.method is gguf, but model.path names no .gguf file. Set it to none, or name one.")
    types, layers = packed_types(files), packable(model, head=False)
    shapes = {path: modules.weight_shape(module, cast(Any, modules.kind_of(module))) for path, module in layers.items()}
    return {path: {"method": "gguf", "type": types[path], "shape": shape} for path, shape in shapes.items() if path in types}


def _packed_in(model: nn.Module, files: Mapping[str, SafeFile]) -> dict[str, nn.Module]:
    """Returns the layers that are packed in the files, by the extra tensors of a packed weight."""
    ends = (
        ".qweight", f".weight{safetensors_layout.NF4_STATE}", ".weight_scale", ".weight_scale_inv",
        f".weight{safetensors_layout.GGUF_TYPE}",
    )  # fmt: skip
    names = {f"{name.removesuffix(end)}.weight": None for name in files for end in ends if name.endswith(end)}
    return {path: model.get_submodule(path) for path in owners(model, names).values()}


def _stacks_in(model: nn.Module, files: Mapping[str, SafeFile], stored: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the stacks of experts that stay packed; without files all of a model in MXFP4."""
    stacks = {path: stack_shape(module, path.rpartition(".")[2]) for path, module in packable_stacks(model).items()}
    if not files:
        whole = method_of(stored) == float_scales.MXFP4
        return {path: {"method": float_scales.MXFP4, "shape": shape} for path, shape in stacks.items() if whole}
    settings = float_scales.stack_settings(files, stored)
    places = targets_of(model, settings)
    joined = joined_stacks(model, packable_stacks(model), files, stored)
    own_names = targets_of(model, joined)
    of_parts = {path: stack.settings for path, stack in joined.items() if own_names.get(path) == path}
    found = {places[name]: own for name, own in settings.items() if stacks.get(places.get(name, "")) == tuple(own["shape"])}
    return {**found, **of_parts}


def _types_in(files: Mapping[str, SafeFile], path: str) -> str:
    """Returns the ggml type of a layer in a folder of packed GGUF blocks."""
    name = next((name for name in files if name.endswith(f"{path}.weight{safetensors_layout.GGUF_TYPE}")), None)
    if name is None:
        raise ConfigError(f"The folder has no GGUF blocks of {path}. Name the .gguf file, or fetch the folder again.")
    return files[name].bytes_of(name).decode("ascii", "replace")  # not as a tensor: a ledger may be active
