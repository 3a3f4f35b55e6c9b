"""Writes a quantised model with other weights in its packed layers: same layout, same settings, all else unchanged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from lorakeet.export.model_folder import TensorGroup, write_model
from lorakeet.formats.files.json_object import read_object
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.formats.files.whole_output import new_output, require_new
from lorakeet.memory.spill import Spill
from lorakeet.merge.checkpoint import CONFIG, files_along
from lorakeet.models.files.gguf_packed import file_blocks
from lorakeet.models.files.stored_tensors import tensor_files
from lorakeet.models.text.packed_layout import PackedLayout
from lorakeet.quant import gptq, safetensors_layout
from lorakeet.quant.gguf import GgufBase
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase


def write_repacked(
    layout: PackedLayout,
    bases: Mapping[str, PackedBase],
    out: Path,
    *,
    tokenizer: Path | None = None,
    waiting: Spill | None = None,
) -> int:
    """Writes the model of `layout` with `bases` (by the layers' paths) to `out`, whole or not at all; returns its bytes.

    A folder becomes a new folder with the same config.json; a .gguf file a new file that differs only in the blocks of those
    layers. `bases` may come from a store and are read one at a time; with `waiting`, their tensors are spilled there until they
    are written. ConfigError if `out` exists, EnvironmentProblem if the disk is too full; nothing is left behind then.
    """
    if layout.file is not None:
        paths = {layout.names[path]: path for path in bases}
        return _patched(layout.file, file_blocks(layout.file, paths, lambda name: _blocks_of(bases[paths[name]])), out)
    files = tensor_files(layout.folder)
    parts = [_part(layout.names[path], partial(bases.__getitem__, path), files) for path in bases]
    taken = {name for path in bases for name in _names(layout.names[path], layout.method)}
    parts += [
        TensorGroup({name: (file.tensors[name].dtype, file.tensors[name].shape)}, _reader(file, name))
        for name, file in files.items()
        if name not in taken
    ]
    config = read_object(layout.folder / CONFIG, expected="the settings of a model")
    return write_model(out, parts, config=config, along=files_along(layout.folder, tokenizer), waiting=waiting)


def _blocks_of(base: PackedBase) -> Tensor:
    if not isinstance(base, GgufBase):
        raise ValueError(f"{type(base).__name__} is no base of a .gguf file")
    return base.packed


def _names(name: str, method: str) -> list[str]:
    if method == "gptq":
        return [f"{name.removesuffix('.weight')}.{part}" for part in gptq.PARTS]
    return [name + part for part in safetensors_layout.NF4_PARTS]


def _part(name: str, read: Callable[[], PackedBase], files: Mapping[str, SafeFile]) -> TensorGroup:
    """The tensors of a packed weight, which is read for their shapes, and again when they are written."""

    def made() -> Mapping[str, Tensor]:
        return _tensors(name, read(), files)

    return TensorGroup({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in made().items()}, made)


def _tensors(name: str, base: PackedBase, files: Mapping[str, SafeFile]) -> dict[str, Tensor]:
    if isinstance(base, GptqBase):
        shapes = gptq.gptq_buffer_shapes(base.shape, bits=base.bits, groups=base.groups)
        own = name.removesuffix(".weight")
        return {f"{own}.{part}": base.get_buffer(part).cpu() for part in shapes}
    if isinstance(base, Nf4Base):
        dtype = safetensors_layout.nf4_dtype(files[name + safetensors_layout.NF4_STATE].read(name + safetensors_layout.NF4_STATE))
        return {name + part: tensor for part, tensor in safetensors_layout.nf4_tensors(base, dtype).items()}
    raise ValueError(f"{type(base).__name__} is no base of a GPTQ or NF4 folder")


def _reader(file: SafeFile, name: str) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: {name: file.read(name)}


def _patched(source: Path, blocks: Iterable[tuple[int, bytes]], out: Path) -> int:
    """A copy of `source` with other bytes at some offsets."""
    require_new(out)
    with new_output(out, source.stat().st_size, "The model") as partial_file:
        shutil.copyfile(source, partial_file)
        with partial_file.open("r+b") as file:
            for offset, content in blocks:
                file.seek(offset)
                file.write(content)
    return out.stat().st_size
