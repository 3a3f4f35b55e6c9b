"""Loads a dense model: mapped files if most weights keep their dtype, else tensor by tensor, each cast as it is read.

Every accessed page of a mapped file counts as memory of the process. If the dtype changes, each weight would be in memory twice
until the last one is cast: for a model stored in fp32, 6 bytes a weight instead of 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from lorakeet.errors import one_message
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.models.files.foreign_code import read_native
from lorakeet.models.files.quantized import read_into, skeleton
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.files.stored_tensors import INDEX, SINGLE, tensor_files
from lorakeet.models.files.validate import auto_class_of, loading, misfits_in, require_whole

AT_ONCE = 4  # most tensors that transformers' loader reads and casts at the same time


def load_dense(source: Path, config: Any, dtype: torch.dtype) -> Any:
    """Loads the frozen model of a folder in eval mode, with eager attention, on the CPU; DataError if it is not complete."""
    files = tensor_files(source)
    with loading(source, config.model_type, files):
        if _is_read_here(source, files, dtype):
            reads = {name: partial(file.read, name) for name, file in files.items()}  # one by one
            model, report = read_into(skeleton(config), reads, dtype, ignore_mismatched_sizes=True)
            model.name_or_path = model.config.name_or_path = str(source)
            take_generation_settings(model, source)
        else:
            with quiet_transformers():
                model, report = read_native(
                    auto_class_of(config),
                    source,
                    config=config,
                    dtype=dtype,
                    attn_implementation="eager",
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # refused by `load_dense`, with names and shapes
                )
    require_whole(source, config.model_type, misfits=misfits_in(report), missing=report["missing_keys"])
    return model.requires_grad_(False).eval()


def _is_read_here(source: Path, files: Mapping[str, SafeFile], dtype: torch.dtype) -> bool:
    """True if most weights change their dtype, or if there is an adapter beside the model, which transformers would load too.

    Files with other names than transformers' own are left to it, which refuses them.
    """
    if not any((source / name).is_file() for name in (SINGLE, INDEX)):
        return False
    if (source / "adapter_config.json").is_file():
        return True
    stored = [file.tensors[name] for name, file in files.items()]
    floats = [(tensor.end - tensor.begin, tensor.dtype != dtype) for tensor in stored if tensor.dtype.is_floating_point]
    return 2 * sum(size for size, changes in floats if changes) > sum(size for size, _ in floats)


def take_generation_settings(model: Any, source: Path) -> None:
    """Sets the generation settings of the folder, such as end-of-text ids, of a model that was loaded tensor by tensor."""
    if model.can_generate():
        with quiet_transformers():
            model.generation_config = _generation(source)


def _generation(source: Path) -> GenerationConfig:
    """Returns the folder's generation settings, from their own file or config.json. DataError for values of a wrong kind."""
    begin = f"{source} has settings for generation that cannot be used"
    try:
        with one_message(begin, "Correct generation_config.json there, or remove it.", passing=(OSError,)):
            return read_native(GenerationConfig, source, local_files_only=True)
    except OSError:
        name = {"config_file_name": "config.json", "_from_model_config": True}
        with one_message(begin, "Correct config.json there, or fetch it again."):
            return read_native(GenerationConfig, source, local_files_only=True, **name)
