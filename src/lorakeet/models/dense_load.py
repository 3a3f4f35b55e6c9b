"""A dense model from its folder: the files' own pages where no number changes, else tensor by tensor, each cast once it is read.

A mapped file counts as memory of the process with every page that was looked at. Where the dtype changes, each number would be
held twice until the last one is cast: of a model stored in fp32, 6 bytes a weight for the 2 that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lorakeet.formats.safe import SafeFile
from lorakeet.models.quantized import skeleton
from lorakeet.models.quiet import quiet_transformers
from lorakeet.models.stock import Promise, tensor_files
from lorakeet.models.whole import misfits_in, refused, require_whole

AT_ONCE = 4  # tensors that transformers' loader reads and casts side by side, at most


def load_dense(source: Path, config: Any, dtype: torch.dtype) -> Any:
    """The frozen model of a folder in eval mode, with eager attention, on the CPU; DataError where its files are no whole."""
    files = tensor_files(source)
    cast = _changes(files, dtype)
    try:
        with quiet_transformers():
            kind, name = (type(skeleton(config)), None) if cast else (AutoModelForCausalLM, source)
            model, report = kind.from_pretrained(
                name,
                state_dict={key: Promise(partial(file.read, key)) for key, file in files.items()} if cast else None,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with names and shapes
            )
            if cast:
                _as_from_folder(model, source)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise refused(source, config.model_type, files, error) from error
    require_whole(source, config.model_type, misfits=misfits_in(report), missing=report["missing_keys"])
    return model.requires_grad_(False).eval()


def _changes(files: Mapping[str, SafeFile], dtype: torch.dtype) -> bool:
    """Whether any number has to be cast."""
    stored = {file.tensors[name].dtype for name, file in files.items()}
    return any(kind.is_floating_point and kind != dtype for kind in stored)


def _as_from_folder(model: Any, source: Path) -> None:
    """What transformers reads beside the weights where it is told the folder."""
    model.name_or_path = model.config.name_or_path = str(source)
    if model.can_generate():
        with suppress(OSError):  # transformers, too, goes on without one, or with one that it cannot read
            model.generation_config = GenerationConfig.from_pretrained(source, local_files_only=True)
