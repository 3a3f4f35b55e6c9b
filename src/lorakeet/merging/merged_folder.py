"""Writes a base with an adapter merged in as a new folder, which transformers loads without Lorakeet or PEFT.

One tensor at a time is read, changed in fp32, rounded once and written; neither a shard nor the model is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter
from lorakeet.formats.files.safetensors_file import save_text, stored_bytes, stream_safetensors
from lorakeet.formats.files.whole_output import new_output, require_new
from lorakeet.merging.checkpoint import CONFIG, Checkpoint, copy_along, files_along, open_checkpoint, write_index
from lorakeet.merging.edits import Change, Edit, Edits, edits_for
from lorakeet.quant.gptq_config import OLD_CONFIG

Dtype = Literal["same", "float32", "bfloat16", "float16"]
Progress = Callable[[int, int, str], None]  # tensors written, tensors in all, name of the last
FP32_COPIES = 4  # of a changed tensor: before, its change, after, and the rounding that is measured
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class MergeResult:
    """What was written, and the rounding error of each changed tensor."""

    folder: Path
    tensors: int
    changed: int
    bytes: int
    rounding: Mapping[str, float] = field(default_factory=dict)  # largest absolute difference to the fp32 sum, by tensor
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> tuple[str, float]:
        """The changed tensor with the largest rounding error, and that error; ("", 0.0) if none was rounded."""
        moved = [item for item in self.rounding.items() if item[1] > 0]
        return max(moved, key=lambda item: (item[1], item[0]), default=("", 0.0))


@dataclass(frozen=True)
class Needs:
    """Bytes of memory beside the adapter, and bytes of disk, that a merge takes."""

    memory: int
    disk: int


def merge_into(
    source: Path | Checkpoint,
    adapter: Adapter,
    out: Path,
    *,
    dtype: Dtype = "same",
    tokenizer: Path | None = None,
    change: Change | None = None,
    before: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    on_progress: Progress | None = None,
) -> MergeResult:
    """Writes the model `source` with `adapter` merged in to the new folder `out`, which appears whole or not at all.

    `dtype` converts every floating tensor, "same" keeps each one's. Tokenizer files come from `tokenizer` where given (a run
    that added tokens), else from `source`. `change` and `before` as in `edits_for`. ConfigError: `out` exists, or
    the adapter does not fit (all of it listed). EnvironmentProblem: the disk is too full, checked before and during the writing.
    """
    require_new(out)
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    edits = edits_for(checkpoint, adapter, change=change, before=before)
    shards = _shards(checkpoint, edits, dtype)
    files = [file for file in files_along(checkpoint.folder, tokenizer) if file.name != OLD_CONFIG]  # what is written is dense
    metadata = {file: checkpoint.shards[file].metadata or {"format": "pt"} for file in shards}
    needed = sum(stored_bytes(shapes, metadata[file]) for file, shapes in shards.items())
    needed_with_files = needed + sum(file.stat().st_size for file in files)
    with new_output(out, needed_with_files, "The merged model") as partial:
        partial.mkdir()
        writer = _Writer(checkpoint, edits, sum(map(len, shards.values())), on_progress)
        for file, shapes in shards.items():
            writer.shapes = shapes
            stream_safetensors(partial / file, shapes, fetch=writer.fetch, metadata=metadata[file])
        write_index(partial, shards)
        if checkpoint.config:
            config = _config(dict(checkpoint.config), edits.config, dtype)
            save_text(partial / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        copy_along(files, partial)
    return MergeResult(out, writer.done, len(edits.by_name), needed, writer.rounding, edits.notes)


def needs_of(source: Path | Checkpoint, adapter: Adapter, *, dtype: Dtype = "same", adapters: int = 0) -> Needs:
    """What `merge_into` takes: a changed tensor as stored and four times in fp32, and once more for each of the `adapters` that
    are combined. ConfigError as there.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    edits = edits_for(checkpoint, adapter)
    memory = 0
    shards = _shards(checkpoint, edits, dtype)
    for name, (kept, shape) in (item for shapes in shards.values() for item in shapes.items()):
        edit = edits.by_name.get(name)
        stored = checkpoint.stored(edit.source if edit else name).dtype.itemsize
        exact = 4 * (FP32_COPIES + adapters) if edit and edit.steps else 0
        memory = max(memory, math.prod(shape) * (stored + (exact or kept.itemsize)))
    disk = sum(stored_bytes(shapes, checkpoint.shards[file].metadata) for file, shapes in shards.items())
    return Needs(memory, disk)


class _Writer:
    """Makes the tensors to write, one by one, and records their rounding errors."""

    def __init__(self, checkpoint: Checkpoint, edits: Edits, total: int, on_progress: Progress | None) -> None:
        self.checkpoint = checkpoint
        self.edits = edits
        self.total = total
        self.on_progress = on_progress
        self.shapes: Shapes = {}
        self.done = 0
        self.rounding: dict[str, float] = {}

    def fetch(self, name: str) -> Tensor:
        edit = self.edits.by_name.get(name)
        source = edit.source if edit else name
        tensor = self.checkpoint.read(source)
        if edit is not None and edit.steps:
            tensor = self._changed(name, edit, tensor)
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(self.done, self.total, name)
        return tensor.to(self.shapes[name][0])

    @torch.no_grad()
    def _changed(self, name: str, edit: Edit, tensor: Tensor) -> Tensor:
        exact = tensor.float()
        del tensor
        for step in edit.steps:
            exact = step(exact)
        rounded = exact.to(self.shapes[name][0])
        narrower = rounded.dtype.itemsize < exact.dtype.itemsize and exact.numel() > 0
        self.rounding[name] = float((exact - rounded.float()).abs_().max()) if narrower else 0.0
        return rounded


def _shards(checkpoint: Checkpoint, edits: Edits, dtype: Dtype) -> dict[str, Shapes]:
    """Dtype and shape of every tensor to write, by file; a new tensor goes to the file of its source."""
    home = dict(checkpoint.home) | {name: checkpoint.home[edit.source] for name, edit in edits.by_name.items()}
    shards: dict[str, Shapes] = {file: {} for file in checkpoint.shards}
    for name, file in home.items():
        edit = edits.by_name.get(name)
        stored = checkpoint.stored(edit.source if edit else name)
        kept = dtype == "same" or not stored.dtype.is_floating_point
        shards[file][name] = (stored.dtype if kept else getattr(torch, dtype), edit.shape if edit else stored.shape)
    return shards


def _config(config: dict[str, Any], changes: Mapping[str, Any], dtype: Dtype) -> dict[str, Any]:
    """config.json with the changed settings, also in its text_config if that has them."""
    text = dict(config["text_config"]) if isinstance(config.get("text_config"), dict) else None
    if text is not None:
        config["text_config"] = text
    for key, value in changes.items():
        if text is not None and (key in text or key not in config):
            text[key] = value
        if text is None or key in config or key == "tie_word_embeddings":
            config[key] = value
    if dtype != "same":
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    return config
