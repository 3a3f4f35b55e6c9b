"""Copies a .gguf model to a folder that keeps the file's own blocks, so that an adapter is trained on exactly these weights.

    x.weight              uint8 (out, bytes of a row)    the rows of a linear layer, as in the file
    x.weight.ggml_type    uint8 (n,)                     the name of their type, such as Q4_K, in ASCII
    all else              fp32                           embeddings, norms, and layers whose type is F32, F16 or BF16

Rows are in transformers' order (llama.cpp permutes the queries and keys of Llama); the blocks of a row stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    Gemma2TensorProcessor,
    LlamaTensorProcessor,
    NemotronTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from lorakeet.errors import DataError, Problems, readable
from lorakeet.formats.files.gguf_file import FileTensor, GgufFile
from lorakeet.formats.files.safetensors_file import stored_bytes, stream_safetensors
from lorakeet.kernels.cache import cache_folder
from lorakeet.models.files.foreign_code import read_native
from lorakeet.models.files.gguf_copy import content_digest, make_whole, require_disk_space
from lorakeet.models.files.gguf_validate import config_of_gguf, reading, require_gguf
from lorakeet.models.files.quantized import packable, skeleton
from lorakeet.quant.gguf import BLOCK_TYPES
from lorakeet.quant.safetensors_layout import GGUF_METHOD, GGUF_TYPE, gguf_type_tensor

_LAYOUT = 1  # version of the copy's content
_PLAIN = ("F32", "F16", "BF16")
# These return each tensor under its own name and shape. GPT-2's saves the head for later, others split or reshape.
_ONE_BY_ONE = (TensorProcessor, LlamaTensorProcessor, NemotronTensorProcessor, Gemma2TensorProcessor)


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of the file: its name in the model, its rows in the model's order, and whether it stays packed."""

    name: str
    stored: FileTensor
    process: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
    packed: bool

    def rows(self) -> NDArray[np.int64]:
        """Returns the row of the file for each row of the model."""
        rows = self.process(np.arange(self.stored.shape[0], dtype=np.int64)[:, None]).reshape(-1)
        if not np.array_equal(np.sort(rows), np.arange(len(rows))):
            raise NotImplementedError(f"transformers changes the numbers of {self.name} as it reads them")
        return rows

    def read(self) -> Tensor:
        """Returns the blocks (out, bytes of a row), or the values in fp32; DataError if the file cannot be read."""
        with readable(self.stored.path):
            stored = self.stored.data if self.packed else self.stored.numbers()
        if self.packed:
            return torch.from_numpy(np.ascontiguousarray(stored[self.rows()]))
        return torch.from_numpy(np.array(self.process(stored), dtype=np.float32))


def packed_copy(path: Path, say: Callable[[str], None]) -> Path:
    """Returns the folder with the blocks, configuration and tokenizer of a .gguf file; made if the cache has none of this
    content.

    Raises DataError if the file is not a readable GGUF or has layers of unsupported types (all are named), EnvironmentProblem if
    a package or disk space is missing.
    """
    target = packed_folder_of(path, content_digest(path))
    if (target / "config.json").is_file():
        return target
    require_gguf(path)
    say(f"Copying the blocks of {path.name} once to {target}; later runs read that folder.")
    with reading(path):
        make_whole(target, lambda partial: _write(path, partial))
    return target


def packed_folder_of(path: Path, digest: str) -> Path:
    """Returns the folder for a .gguf file with this content, which may not exist yet."""
    return cache_folder() / "gguf-packed" / f"{path.stem}-{digest[:16]}-{_LAYOUT}"


def file_blocks(path: Path, names: Collection[str], blocks_of: Callable[[str], Tensor]) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, bytes) of new blocks in the .gguf file `path`, for the weights `names` (transformers' names).

    `blocks_of` returns the blocks (out, bytes of a row) of one weight. Raises DataError for names that the file lacks.
    """
    tensors = tensors_of(path, config_of_gguf(path))
    if missing := sorted(set(names) - {tensor.name for tensor in tensors}):
        raise DataError(f"{path} has no tensors {', '.join(missing[:8])}, whose blocks would be written to it.")
    for tensor in tensors:
        if tensor.name in names:
            given = blocks_of(tensor.name).cpu().numpy()
            blocks = np.empty_like(given)
            blocks[tensor.rows()] = given
            yield tensor.stored.offset, blocks.tobytes()


def packed_types(path: Path) -> dict[str, str]:
    """Returns the ggml type of each linear layer that stays packed, by the layer's path, from the file's header.

    Raises DataError and EnvironmentProblem as `packed_copy` does.
    """
    tensors = tensors_of(path, config_of_gguf(path))
    return {tensor.name.removesuffix(".weight"): tensor.stored.kind for tensor in tensors if tensor.packed}


def _write(path: Path, out: Path) -> None:
    config = config_of_gguf(path)
    tokenizer: Any = read_native(AutoTokenizer, path.parent, gguf_file=path.name)
    tensors = {tensor.name: tensor for tensor in tensors_of(path, config)}
    shapes = {name: shape for tensor in tensors.values() for name, shape in stored_shapes(tensor).items()}
    require_disk_space(path, out.parent, stored_bytes(shapes, {"format": "pt"}))
    out.mkdir()

    def fetch(name: str) -> Tensor:
        if name.endswith(GGUF_TYPE):
            return gguf_type_tensor(tensors[name.removesuffix(GGUF_TYPE)].stored.kind)
        return tensors[name].read()

    stream_safetensors(out / "model.safetensors", shapes, fetch=fetch, metadata={"format": "pt"})
    tokenizer.save_pretrained(out)
    config.quantization_config = {"quant_method": GGUF_METHOD}
    config.save_pretrained(out)


def one_by_one(architecture: str) -> bool:
    """True if transformers makes each tensor of a model of this architecture from one tensor of the file, in any order."""
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor) in _ONE_BY_ONE


def tensors_of(path: Path, config: Any, *, packed: bool = True) -> list[ModelTensor]:
    """Returns the tensors of the file by transformers' names; DataError with every layer of an unsupported type.

    Without `packed`, for an architecture that is read `one_by_one`, every tensor is read in fp32, and tensors that are not in the
    model are left out, as transformers does.
    """
    file = GgufFile(path)
    architecture = file.text("general.architecture")
    if not packed and not one_by_one(architecture):
        raise NotImplementedError(f"tensors of {architecture} cannot be read one by one")
    model = skeleton(config)
    parsed = load_gguf_checkpoint(str(path), return_tensors=False)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed["config"])
    names = get_gguf_hf_weights_map(model, processor)
    layers = packable(model, head=False)
    problems = Problems(f"{path} cannot be trained on as it is", DataError)
    found = []
    for _, entry in file.tensors():
        if len(entry.shape) > 2:
            problems.add(f"{entry.name} has experts, whose blocks are not supported; use model.quantize none, a dense copy.")
            continue
        renamed = processor.process(
            weights=np.zeros((1, 1)) if len(entry.shape) < 2 else np.zeros((entry.shape[0], 1)),
            name=entry.name, tensor_key_mapping=names, parsed_parameters=parsed,
        )  # fmt: skip
        name, kind = names.get(renamed.name), entry.kind
        if name is None and not packed:
            continue
        if name is None:
            problems.add(f"{entry.name} is not in transformers' model; use the model's safetensors folder.")
            continue
        layer = packed and name.removesuffix(".weight") in layers and kind not in _PLAIN
        if layer and kind not in BLOCK_TYPES:
            problems.add(f"{entry.name} is {kind}; layers may be {', '.join((*BLOCK_TYPES, *_PLAIN))}.")
        found.append(ModelTensor(name, entry, _process(processor, entry.name, names, parsed), layer))
    problems.raise_if_any()
    return found


def _process(
    processor: Any, name: str, names: Mapping[str, str], parsed: Mapping[str, Any]
) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Returns transformers' conversion of the values of a tensor of that name."""

    def process(weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        done = processor.process(weights=weights, name=name, tensor_key_mapping=names, parsed_parameters=parsed)
        return np.asarray(done.weights)

    return process


def stored_shapes(tensor: ModelTensor) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Returns dtype and shape of the tensors that are written for one tensor."""
    if not tensor.packed:
        shape = tensor.process(np.zeros(tensor.stored.shape, np.float32)).shape  # dequantises nothing
        return {tensor.name: (torch.float32, tuple(shape))}
    blocks = tensor.stored.layout[1]
    kind = (torch.uint8, (len(tensor.stored.kind),))
    return {tensor.name: (torch.uint8, blocks), tensor.name + GGUF_TYPE: kind}
