"""A dense model from its folder: the files' own pages where most numbers stay, else tensor by tensor, each cast as it is read.

A mapped file counts as memory of the process with every page that was looked at. Where the dtype changes, each number would be
held twice until the last one is cast: of a model stored in fp32, 6 bytes a weight for the 2 that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.models.files.quantized import Loaded, read_into, skeleton
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.files.stored_tensors import INDEX, SINGLE, tensor_files
from lorakeet.models.files.validate import misfits_in, refused, require_whole

AT_ONCE = 4  # tensors that transformers' loader reads and casts side by side, at most


def load_dense(source: Path, config: Any, dtype: torch.dtype) -> Any:
    """The frozen model of a folder in eval mode, with eager attention, on the CPU; DataError where its files are no whole."""
    files = tensor_files(source)
    try:
        if _is_read_here(source, files, dtype):
            model, report = _read(source, files, config, dtype)
        else:
            model, report = _mapped(source, config, dtype)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise refused(source, config.model_type, files, error) from error
    require_whole(source, config.model_type, misfits=misfits_in(report), missing=report["missing_keys"])
    return model.requires_grad_(False).eval()


def _mapped(source: Path, config: Any, dtype: torch.dtype) -> Loaded:
    """The model as transformers loads it, with its report."""
    with quiet_transformers():
        found: Loaded = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused by `load_dense`, with names and shapes
        )
    return found


def _read(source: Path, files: Mapping[str, SafeFile], config: Any, dtype: torch.dtype) -> Loaded:
    """The same of tensors that are read one by one, with what transformers adds where it is told the folder."""
    reads = {name: partial(file.read, name) for name, file in files.items()}
    model, report = read_into(skeleton(config), reads, dtype, ignore_mismatched_sizes=True)
    model.name_or_path = model.config.name_or_path = str(source)
    take_generation_settings(model, source)
    return model, report


def _is_read_here(source: Path, files: Mapping[str, SafeFile], dtype: torch.dtype) -> bool:
    """Whether most numbers change their dtype (a few are cast from a page that stays), or an adapter lies beside the model, which
    transformers would put into it unasked. Files that have other names than its own are left to it to refuse."""
    if not any((source / name).is_file() for name in (SINGLE, INDEX)):
        return False
    if (source / "adapter_config.json").is_file():
        return True
    stored = [file.tensors[name] for name, file in files.items()]
    floats = [(tensor.end - tensor.begin, tensor.dtype != dtype) for tensor in stored if tensor.dtype.is_floating_point]
    return 2 * sum(size for size, changes in floats if changes) > sum(size for size, _ in floats)


def take_generation_settings(model: Any, source: Path) -> None:
    """Gives a model that was put together tensor by tensor the settings of its folder, such as the ids that end a text."""
    if model.can_generate():
        with quiet_transformers():
            model.generation_config = _generation(source)


def _generation(source: Path) -> GenerationConfig:
    """The folder's settings for generation as transformers finds them: in a file of their own, or in config.json."""
    try:
        return GenerationConfig.from_pretrained(source, local_files_only=True)
    except OSError:
        name = {"config_file_name": "config.json", "_from_model_config": True}
        return GenerationConfig.from_pretrained(source, local_files_only=True, **name)
