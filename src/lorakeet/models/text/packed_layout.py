"""Reads which layers of a quantised model are packed and how, from a folder or a .gguf file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lorakeet.errors import ConfigError
from lorakeet.models.files.gguf_packed import packed_copy
from lorakeet.models.files.quantized import owners, skeleton
from lorakeet.models.files.source import find_source, gguf_file
from lorakeet.models.files.stored_tensors import READERS, method_of, stored_quantisation, tensor_files
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import read_config
from lorakeet.quant.packed import PackedBase

METHODS = ("gptq", "nf4", "gguf")


@dataclass(frozen=True)
class PackedLayout:
    """The packed layers of a model, by path; a layer is read when its function is called."""

    method: str  # one of METHODS
    folder: Path  # with the packed tensors; of a .gguf file a copy in the cache
    file: Path | None  # the .gguf file
    layers: Mapping[str, Callable[[], PackedBase]]
    names: Mapping[str, str]  # layer path to the name of its weight in the folder


def read_layout(path: str, say: Callable[[str], None]) -> PackedLayout:
    """Reads the layout of the quantised model `path`; ConfigError if it is not quantised, or by another method."""
    file = gguf_file(path)
    folder = packed_copy(file, say) if file is not None else find_source(ModelSpec(path=path), say)
    config = read_config(folder)
    stored = stored_quantisation(config)
    method = method_of(stored) if stored else ""
    if not stored or method not in METHODS:
        was = f"is in {method}" if method else "is not quantised"
        raise ConfigError(
            f"{path} {was}; expected a model in {', '.join(METHODS)}, whose layout is reused. Make one with "
            "lorakeet quantize, or lorakeet export --to gguf, and name it with --like."
        )
    stored_model = READERS[str(stored["quant_method"])](tensor_files(folder), stored)
    paths = owners(skeleton(config), stored_model.packed)
    packed = cast("Mapping[str, Callable[[], PackedBase]]", stored_model.packed)  # of these methods no stack
    layers = {layer: packed[name] for name, layer in paths.items()}
    if not layers:
        raise ConfigError(f"{path} has no packed layers, so there is nothing to merge into.")
    return PackedLayout(method, folder, file, layers, {layer: name for name, layer in paths.items()})
