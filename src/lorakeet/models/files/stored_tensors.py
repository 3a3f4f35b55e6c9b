"""The lazy tensors of a model folder, by the names in its files: dense tensors, and packed weights made of several tensors.

Only headers are read here; a tensor or a packed weight is read when its function is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import ConfigError, DataError, Problems
from lorakeet.formats.files.safetensors_file import SafeFile, open_safetensors, read_index
from lorakeet.models.files import float_scales
from lorakeet.models.files.validate import require_finite
from lorakeet.quant import gptq, gptq_config, safetensors_layout
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.stack import PackedStack

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_REMEDY = "Fetch the model again, or make it again with lorakeet quantize."


@dataclass(frozen=True)
class StoredModel:
    """The lazy tensors of a model folder, by the names in its files."""

    dense: Mapping[str, Callable[[], Tensor]]
    packed: Mapping[str, Callable[[], PackedBase | PackedStack]]  # by the dense weight's name, such as "….q_proj.weight"
    pack: Mapping[str, Callable[[Tensor], PackedStack]] = field(default_factory=dict)  # what a model's stack of experts becomes

    @property
    def reads(self) -> dict[str, Callable[[], Any]]:
        """All tensors."""
        return {**self.dense, **self.packed}


def stored_quantisation(config: Any) -> dict[str, Any] | None:
    """Returns the quantization_config of a model's config.json as a mapping, or None if it is not quantised."""
    found = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    if not found:
        return None
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def stored_dtype(config: Any) -> torch.dtype:
    """Returns the stored dtype of a model's config.json; fp32 by default."""
    return getattr(config, "dtype", None) or torch.float32


def method_of(stored: Mapping[str, Any]) -> str:
    """Returns Lorakeet's name for the method of a quantization_config: nf4, int8, gptq, …; empty without one."""
    method = str(stored.get("quant_method", ""))
    return "nf4" if method == "bitsandbytes" else method.removeprefix("lorakeet_")


def tensor_files(folder: Path) -> dict[str, SafeFile]:
    """Returns the file of each tensor of a model folder, with checked headers; reads no tensors."""
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():  # of both, transformers takes the single file
        return indexed_tensors(folder / INDEX)
    shards = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    return {name: file for file in map(open_safetensors, shards) for name in file.tensors}


def indexed_tensors(index: Path) -> dict[str, SafeFile]:
    """Returns the file of each tensor in an index of several files, with checked headers; reads no tensors."""
    home = read_index(index)
    files = {file: open_safetensors(index.parent / file) for file in sorted(set(home.values()))}
    lost = [name for name, file in home.items() if name not in files[file].tensors]
    if lost:
        raise DataError(f"{index} lists {len(lost)} tensors that their files do not have, such as {lost[0]}.")
    return {name: files[file] for name, file in home.items()}


def dense_model(files: Mapping[str, SafeFile]) -> StoredModel:
    """Returns every tensor as a dense one."""
    return StoredModel({name: _reader(file, name) for name, file in files.items()}, {})


def _reader(file: SafeFile, name: str) -> Callable[[], Tensor]:
    return lambda: _read(file, name)


def _read(file: SafeFile, name: str) -> Tensor:
    """Reads a tensor of a file; DataError with its name if it has values that are not finite."""
    tensor = file.read(name)
    require_finite(tensor, f"{file.path}: {name}")
    return tensor


def _stock_of(
    files: Mapping[str, SafeFile],
    mark: str,
    parts: tuple[str, ...],
    decode: Callable[[str, Mapping[str, Tensor]], PackedBase],
    *,
    optional: tuple[str, ...] = (),
) -> StoredModel:
    """Returns the lazy tensors of a folder in which a tensor `x` + `mark` marks `x` as packed in tensors `x` + each of `parts`.

    Raises DataError with every part, but `optional` ones, that a packed weight lacks.
    """
    names = [name.removesuffix(mark) for name in files if name.endswith(mark)]
    taken = {name + part for name in names for part in parts}
    problems = Problems("The model's packed weights are not whole", DataError, remedy=_REMEDY)
    for name in names:
        lost = [f"'{name}{part}'" for part in parts if part not in optional and name + part not in files]
        if lost:
            problems.add(f"{files[name + mark].path}: {', '.join(lost)} {'is' if len(lost) == 1 else 'are'} missing.")
    problems.raise_if_any()

    def packed(name: str) -> Callable[[], PackedBase]:
        found = [part for part in parts if name + part in files]
        return lambda: decode(name, {part: _read(files[name + part], name + part) for part in found})

    dense = {name: _reader(file, name) for name, file in files.items() if name not in taken}
    return StoredModel(dense, {name: packed(name) for name in names})


def _nf4_stock(files: Mapping[str, SafeFile], stored: Mapping[str, Any]) -> StoredModel:
    kind = stored.get("bnb_4bit_quant_type", "fp4") if stored.get("load_in_4bit") else "LLM.int8"
    if kind != "nf4":
        raise ConfigError(
            f"The quantised weights are {kind} of bitsandbytes, of which only nf4 is supported. Name the unquantised model."
        )
    return _stock_of(
        files,
        safetensors_layout.NF4_STATE,
        safetensors_layout.NF4_PARTS,
        safetensors_layout.nf4_base,
        optional=safetensors_layout.NF4_NESTED,
    )


def _gptq_stock(files: Mapping[str, SafeFile], stored: Mapping[str, Any]) -> StoredModel:
    config = gptq_config.parse(stored, str(next(iter(files.values())).path.with_name("config.json")) if files else "config.json")
    ends = {f".{part}" for part in gptq.PARTS}
    names = dict.fromkeys(name.rpartition(".")[0] for name in files if name.endswith((".qweight", ".qzeros")))
    problems = Problems("The model's GPTQ tensors do not fit its settings", DataError, remedy=_REMEDY)
    packed: dict[str, Callable[[], PackedBase]] = {}
    for name in names:
        settings = config.for_layer(name)
        parts = {part: files[f"{name}.{part}"] for part in gptq.PARTS if f"{name}.{part}" in files}
        headers = {part: file.tensors[f"{name}.{part}"] for part, file in parts.items()}
        if settings is None:
            problems.add(f"'{name}' is packed, but 'dynamic' in config.json says that it is dense.")
            continue
        where = next(iter(parts.values())).path
        shapes = {part: (header.dtype, header.shape) for part, header in headers.items()}
        for problem in gptq_config.layer_problems(name, shapes, settings):
            problems.add(f"{where}: {problem}")
        packed[f"{name}.weight"] = _gptq_reader(name, parts, settings)
    problems.raise_if_any()
    taken = {f"{name}{end}" for name in names for end in ends}
    return StoredModel({name: _reader(file, name) for name, file in files.items() if name not in taken}, packed)


def _gptq_reader(name: str, parts: Mapping[str, SafeFile], settings: gptq_config.GptqConfig) -> Callable[[], PackedBase]:
    return lambda: gptq_config.base_from(name, {part: _read(file, f"{name}.{part}") for part, file in parts.items()}, settings)


def _scaled_stock(files: Mapping[str, SafeFile], stored: Mapping[str, Any]) -> StoredModel:
    float_scales.require_known(stored, next(iter(files.values())).path.parent if files else "The folder")
    return StoredModel(*float_scales.scaled_tensors(files, stored, _read))


# Readers by the quant_method of config.json: a new method is a line here.
READERS: dict[str, Callable[[Mapping[str, SafeFile], Mapping[str, Any]], StoredModel]] = {
    "bitsandbytes": _nf4_stock,
    safetensors_layout.INT8_METHOD: lambda files, _: _stock_of(
        files, "_scale", safetensors_layout.INT8_PARTS, safetensors_layout.int8_base
    ),
    safetensors_layout.GGUF_METHOD: lambda files, _: _stock_of(
        files, safetensors_layout.GGUF_TYPE, ("", safetensors_layout.GGUF_TYPE), safetensors_layout.gguf_base
    ),
    gptq_config.METHOD: _gptq_stock,
    float_scales.FP8: _scaled_stock,
    float_scales.COMPRESSED: _scaled_stock,
    float_scales.MXFP4: lambda files, _: StoredModel(float_scales.mxfp4_tensors(files, _read), {}),
}
