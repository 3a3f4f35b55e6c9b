"""A model folder on disk: its safetensors shards by tensor name, its config.json, and the files to copy beside them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import ConfigError, DataError, LorakeetError
from lorakeet.formats.files.json_object import read_object
from lorakeet.formats.files.safetensors_file import SafeFile, TensorEntry, open_safetensors, read_index, save_text
from lorakeet.models.files.checkpoint_pieces import Piece, pieces_of
from lorakeet.models.files.quantized import skeleton
from lorakeet.models.text.load import read_config

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
_NOT_COPIED = {CONFIG, "README.md"}  # the README describes the base
_ALONG = ("additional_chat_templates",)
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "chat_template")
# Prefixes that some model classes add and others do not, so a checkpoint may lack them.
_WRAPPERS = {"model", "transformer", "language_model", "text_model", "base_model"}
# The name of a module in memory, and in Mixtral's checkpoints.
_RENAMED = ((".mlp.", ".block_sparse_moe."),)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by name; none is read."""

    folder: Path
    shards: Mapping[str, SafeFile]  # by file name
    home: Mapping[str, str]  # tensor name to file name
    config: Mapping[str, Any]

    def stored(self, name: str) -> TensorEntry:
        return self.shards[self.home[name]].tensors[name]

    def read(self, name: str) -> Tensor:
        return self.shards[self.home[name]].read(name)

    def find(self, wanted: str) -> str | None:
        """The name on disk of the model's parameter `wanted`, or None."""
        spellings = [wanted, *(wanted.replace(old, new) for old, new in _RENAMED if old in wanted)]
        for spelling in spellings:
            if spelling in self.home:
                return spelling
        cores = {_core(spelling) for spelling in spellings}
        found = [name for name in self.home if _core(name) in cores]
        return found[0] if len(found) == 1 else None

    @cached_property
    def pieces(self) -> Mapping[str, tuple[Piece, ...]]:
        """Where the parameters of the model lie in the tensors, as transformers reads them; empty where it writes no text."""
        try:
            model = skeleton(read_config(self.folder))
        except LorakeetError:
            return {}
        shapes = {name: entry.shape for shard in self.shards.values() for name, entry in shard.tensors.items()}
        return pieces_of(model, shapes)

    def setting(self, name: str) -> Any:
        """A value of config.json or of its text_config; None if there is none."""
        text = self.config.get("text_config")
        return self.config.get(name, text.get(name) if isinstance(text, dict) else None)


def _core(name: str) -> str:
    parts = name.split(".")
    while len(parts) > 2 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens the checkpoint in `folder` and checks every shard's header. ConfigError, DataError name what is missing or broken."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; expected one with {CONFIG} and {SINGLE} or {INDEX}.")
    config = read_object(folder / CONFIG, expected="the settings of a model") if (folder / CONFIG).exists() else {}
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(
            f"{folder} holds quantised weights ({method}); a merge needs the dense model they were made from. Name that "
            "one with --base, or keep it quantised: lorakeet merge RUN --into packed."
        )
    if (folder / INDEX).exists():
        home = read_index(folder / INDEX)
    elif (folder / SINGLE).exists():
        home = dict.fromkeys(open_safetensors(folder / SINGLE).tensors, SINGLE)
    else:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        also = f" {', '.join(pickles)}: pickle files, which are never opened; save the model as safetensors." if pickles else ""
        raise DataError(f"{folder} has neither {SINGLE} nor {INDEX}.{also}")
    shards = {file: open_safetensors(folder / file) for file in sorted(set(home.values()))}
    lost = sorted(name for name, file in home.items() if name not in shards[file].tensors)
    if lost:
        raise DataError(f"{folder / INDEX} lists {len(lost)} tensors that their files do not have: {', '.join(lost[:8])}.")
    return Checkpoint(folder, shards, home, config)


def write_index(folder: Path, shards: Mapping[str, Shapes]) -> None:
    """Writes the index of a model in several files to `folder`; none for a single file."""
    if list(shards) != [SINGLE]:
        sizes = (math.prod(shape) * dtype.itemsize for shapes in shards.values() for dtype, shape in shapes.values())
        home = {name: file for file, shapes in shards.items() for name in shapes}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": home}
        save_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def files_along(source: Path, tokenizer: Path | None) -> list[Path]:
    """The files to copy beside the weights; the tokenizer's come from `tokenizer` if given."""
    files = [file for file in sorted(source.iterdir()) if file.is_file() and _goes_along(file)]
    for name in _ALONG:
        files += sorted(file for file in (source / name).glob("*") if file.is_file())
    if tokenizer is not None:
        files = [file for file in files if not file.name.startswith(_TOKENIZER)] + tokenizer_files(tokenizer)
    return files


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files of `folder`."""
    return [
        file for file in sorted(folder.iterdir()) if file.is_file() and file.name.startswith(_TOKENIZER) and _goes_along(file)
    ]


def _goes_along(file: Path) -> bool:
    return file.suffix not in _WEIGHTS and file.name not in _NOT_COPIED and not file.name.endswith(".index.json")


def copy_along(files: Iterable[Path], out: Path) -> None:
    """Copies `files` into `out`; those of a known subfolder keep it."""
    for file in files:
        place = out / file.parent.name if file.parent.name in _ALONG else out
        place.mkdir(exist_ok=True)
        shutil.copyfile(file, place / file.name)
