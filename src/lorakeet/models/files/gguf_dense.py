"""A .gguf model as a dense safetensors folder in fp32, made once and kept in the cache folder; one tensor in memory at a time.

A file with stacked experts, or of an architecture whose tensors transformers does not make one by one (GPT-2, BLOOM), is unpacked
by it, with the whole model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lorakeet.formats.files.gguf_header import PART_BYTES, GgufHeader
from lorakeet.formats.files.safetensors_file import stream_safetensors
from lorakeet.kernels.cache import cache_folder
from lorakeet.models.files.gguf_copy import content_digest, make_whole, require_room
from lorakeet.models.files.gguf_packed import one_by_one, stored_shapes, tensors_of
from lorakeet.models.files.gguf_validate import ARCHITECTURE, config_of_gguf, reading, require_gguf
from lorakeet.models.files.quantized import skeleton

_LAYOUT = 1  # counted up when what is written into a copy changes
_LARGEST_GROWTH = 10  # fp32 bytes of a copy per byte of a 3-bit file: the room that must be free
_FP32 = 4
_COPIES = 4  # of a tensor in fp32: as it lies in the file, what its blocks mean, the parts of that, and in the model's order
_READINGS = 2  # of the header, that hold their objects at the same time: transformers' and the tokenizer's


def dense_copy(path: Path, say: Callable[[str], None]) -> Path:
    """The folder with the dense fp32 copy and the tokenizer of a .gguf file; made if the cache has none of this content.

    The copy appears whole or not at all. Raises DataError for a file that is no readable GGUF, EnvironmentProblem where a
    package or room on the disk is missing.
    """
    target = dense_place(path, content_digest(path))
    if (target / "config.json").is_file():
        return target
    require_gguf(path)
    require_room(path, target.parent, path.stat().st_size * _LARGEST_GROWTH)
    say(f"Unpacking {path.name} once into {target}; later runs read that copy.")
    make_whole(target, lambda partial: _convert(path, partial))
    return target


def dense_place(path: Path, digest: str) -> Path:
    """Where the copy of a .gguf file of that content is, once it has been made."""
    return cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}-{_LAYOUT}"


def bytes_of_unpacking(header: GgufHeader, *, packed: bool = False) -> int:
    """What is held at most while a .gguf file is unpacked: objects for its header, and its largest tensor; where
    transformers unpacks it, the whole model. With `packed` its blocks are laid out as they are (models/files/gguf_packed).
    """
    sizes = [math.prod(slot.shape) for slot in header.tensors.values()]
    whole = _by_transformers(header) and not packed
    return bytes_of_header(header) + _FP32 * (2 * sum(sizes) if whole else _COPIES * max(sizes, default=0))


def bytes_of_header(header: GgufHeader) -> int:
    """What the objects take that are made of the header of a .gguf file while its tensors are read."""
    return _READINGS * PART_BYTES * header.parts


def _by_transformers(header: GgufHeader) -> bool:
    """Whether the file is unpacked by transformers, for what its tensors become is not known tensor by tensor."""
    stacked = any(len(slot.shape) > 2 for slot in header.tensors.values())
    return stacked or not one_by_one(str(header.values[ARCHITECTURE]))


def _convert(path: Path, out: Path) -> None:
    config = config_of_gguf(path)
    if _by_transformers(require_gguf(path)):
        _through_transformers(path, out)
        return
    with reading(path):
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
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
    """The same by transformers itself."""
    with reading(path):
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.config.quantization_config = None
        del model.config.quantization_config
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
