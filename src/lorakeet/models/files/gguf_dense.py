"""Converts a .gguf model once to a dense safetensors folder in fp32, in the cache folder; one tensor is in memory at a time.

A file with stacked experts, or of an architecture whose tensors transformers does not convert one by one (GPT-2, BLOOM), is
converted by transformers, with the whole model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lorakeet.formats.files.gguf_header import PART_BYTES, GgufHeader
from lorakeet.formats.files.safetensors_file import stream_safetensors
from lorakeet.kernels.cache import cache_folder
from lorakeet.models.files.foreign_code import read_native
from lorakeet.models.files.gguf_copy import content_digest, make_whole, require_disk_space
from lorakeet.models.files.gguf_packed import one_by_one, stored_shapes, tensors_of
from lorakeet.models.files.gguf_validate import ARCHITECTURE, config_of_gguf, reading, require_gguf
from lorakeet.models.files.quantized import skeleton

_LAYOUT = 1  # version of the copy's content
_LARGEST_GROWTH = 10  # fp32 bytes of a copy per byte of a 3-bit file, for the check of free disk space
_FP32 = 4
_COPIES = 4  # of a tensor in fp32: file blocks, values, parts of these, and values in the model's order
_READINGS = 2  # of the header in memory at the same time: transformers' and the tokenizer's


def dense_copy(path: Path, say: Callable[[str], None]) -> Path:
    """Returns the folder with the dense fp32 copy and the tokenizer of a .gguf file; made if the cache has none of this content.

    The copy appears whole or not at all. Raises DataError if the file is not a readable GGUF, EnvironmentProblem if a package or
    disk space is missing.
    """
    target = dense_folder(path, content_digest(path))
    if (target / "config.json").is_file():
        return target
    require_gguf(path)
    require_disk_space(path, target.parent, path.stat().st_size * _LARGEST_GROWTH)
    say(f"Unpacking {path.name} once into {target}; later runs read that copy.")
    make_whole(target, lambda partial: _convert(path, partial))
    return target


def dense_folder(path: Path, digest: str) -> Path:
    """Returns the folder of the copy of a .gguf file with this content, which may not exist yet."""
    return cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}-{_LAYOUT}"


def bytes_of_unpacking(header: GgufHeader, *, packed: bool = False) -> int:
    """Returns the peak in bytes of converting a .gguf file: its header's objects and its largest tensor, or the whole model if
    transformers converts it. With `packed` its blocks stay packed (models/files/gguf_packed).
    """
    sizes = [math.prod(slot.shape) for slot in header.tensors.values()]
    whole = _by_transformers(header) and not packed
    return bytes_of_header(header) + _FP32 * (2 * sum(sizes) if whole else _COPIES * max(sizes, default=0))


def bytes_of_header(header: GgufHeader) -> int:
    """Returns the bytes of the objects of a .gguf file's header while its tensors are read."""
    return _READINGS * PART_BYTES * header.parts


def _by_transformers(header: GgufHeader) -> bool:
    """True if transformers converts the file, since its tensors do not become the model's one by one."""
    stacked = any(len(slot.shape) > 2 for slot in header.tensors.values())
    return stacked or not one_by_one(str(header.values[ARCHITECTURE]))


def _convert(path: Path, out: Path) -> None:
    config = config_of_gguf(path)
    if _by_transformers(require_gguf(path)):
        _through_transformers(path, out)
        return
    with reading(path):
        tokenizer: Any = read_native(AutoTokenizer, path.parent, gguf_file=path.name)
        tokenizer.save_pretrained(out)
        del tokenizer
        tensors = {tensor.name: tensor for tensor in tensors_of(path, config, packed=False)}
        shapes = {name: shape for tensor in tensors.values() for name, shape in stored_shapes(tensor).items()}

        def fetch(name: str) -> Tensor:
            return tensors[name].read()

        stream_safetensors(out / "model.safetensors", shapes, fetch=fetch, metadata={"format": "pt"})
        model = skeleton(config)
        model.config.dtype = torch.float32
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(out)
        model.generation_config.save_pretrained(out)


def _through_transformers(path: Path, out: Path) -> None:
    """Converts the file with transformers, in a folder of its own: an adapter beside it would be loaded too."""
    with reading(path), TemporaryDirectory(prefix="lorakeet-") as alone:
        (Path(alone) / path.name).symlink_to(path.resolve())
        tokenizer: Any = read_native(AutoTokenizer, path.parent, gguf_file=path.name)
        model: Any = read_native(
            AutoModelForCausalLM, alone, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.config.quantization_config = None
        del model.config.quantization_config
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
