"""Writes a model folder shard by shard, with tensors that are made when they are written; it appears whole or not at all.

A quantised model is written again with other weights in its packed layers: same layout, same settings, all else unchanged.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakeet.formats.files.json_object import read_object
from lorakeet.formats.files.safetensors_file import SafeFile, save_text, stored_bytes, stream_safetensors
from lorakeet.formats.files.whole_output import new_output, require_new
from lorakeet.memory.spill import Spill
from lorakeet.merging.checkpoint import CONFIG, SINGLE, Shapes, copy_along, files_along, write_index
from lorakeet.models.files.gguf_packed import file_blocks
from lorakeet.models.files.stored_tensors import tensor_files
from lorakeet.models.text.packed_layout import PackedLayout
from lorakeet.quant import gptq, safetensors_layout
from lorakeet.quant.gguf import GgufBase
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase

SHARD_BYTES = 1 << 30  # tensors made together are kept in memory until they are written: at most a shard of them
_METADATA = {"format": "pt"}  # which transformers requires
Progress = Callable[[int, int, str], None]  # parts done, parts in all, a tensor of the last one


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are made together, such as those of a packed weight; dtypes and shapes are known before."""

    shapes: Shapes
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.shapes.values())


def write_model(
    out: Path,
    parts: Sequence[TensorGroup],
    *,
    config: Mapping[str, Any],
    along: Sequence[Path] = (),
    readme: str = "",
    shard_bytes: int = SHARD_BYTES,
    waiting: Spill | None = None,
    on_progress: Progress | None = None,
) -> int:
    """Writes the tensors of `parts`, config.json, copies of the files `along` and README.md with the text `readme` to the new
    folder `out`.

    Returns its bytes. At most one shard of made tensors and the memory of one `make` are in use; with `waiting`, tensors are
    spilled there until they are written. ConfigError if `out` exists, EnvironmentProblem if the disk is too full, before or
    during writing; nothing is left behind then.
    """
    require_new(out)
    shards = _shards(parts, shard_bytes)
    shapes = {file: {name: stored for part in shard for name, stored in part.shapes.items()} for file, shard in shards.items()}
    needed = sum(stored_bytes(found, _METADATA) for found in shapes.values())
    needed += sum(file.stat().st_size for file in along)
    with new_output(out, needed, "The model") as partial:
        partial.mkdir()
        maker = _Maker(len(parts), waiting or Spill(), on_progress)
        for file, shard in shards.items():
            maker.begin(shard)
            stream_safetensors(partial / file, shapes[file], fetch=maker.fetch, metadata=_METADATA)
        write_index(partial, shapes)
        save_text(partial / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        copy_along(along, partial)
        if readme:
            save_text(partial / "README.md", readme)
    return needed


class _Maker:
    """Makes a part when its first tensor is requested, and keeps the rest until it is requested too."""

    def __init__(self, total: int, waiting: Spill, on_progress: Progress | None) -> None:
        self.total = total
        self.on_progress = on_progress
        self.done = 0
        self.home: dict[str, TensorGroup] = {}
        self.waiting = waiting

    def begin(self, shard: Sequence[TensorGroup]) -> None:
        self.home = {name: part for part in shard for name in part.shapes}

    def fetch(self, name: str) -> Tensor:
        if name in self.waiting:
            return self.waiting.take(name)
        made = dict(self.home[name].make())
        wanted = made.pop(name)
        for other, tensor in made.items():
            self.waiting.put(other, tensor)
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total, name)
        return wanted


def _shards(parts: Sequence[TensorGroup], most: int) -> dict[str, list[TensorGroup]]:
    """The parts of each file, in order, each file of at most `most` bytes unless a single part is larger."""
    files: list[list[TensorGroup]] = [[]]
    for part in parts:
        if files[-1] and sum(held.bytes for held in files[-1]) + part.bytes > most:
            files.append([])
        files[-1].append(part)
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{number:05d}-of-{len(files):05d}.safetensors": shard for number, shard in enumerate(files, 1)}


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
    parts += [part_as_it_is(name, file) for name, file in files.items() if name not in taken]
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


def part_as_it_is(name: str, file: SafeFile) -> TensorGroup:
    """The stored tensor, unchanged."""
    stored = file.tensors[name]
    return TensorGroup({name: (stored.dtype, stored.shape)}, lambda: {name: file.read(name)})
