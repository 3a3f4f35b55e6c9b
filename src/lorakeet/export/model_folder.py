"""Writes a model folder shard by shard, with tensors that are made when they are written; it appears whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakeet.formats.files.safetensors_file import save_text, stored_bytes, stream_safetensors
from lorakeet.formats.files.whole_output import new_output, require_new
from lorakeet.memory.spill import Spill
from lorakeet.merge.checkpoint import CONFIG, SINGLE, Shapes, copy_along, write_index

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
