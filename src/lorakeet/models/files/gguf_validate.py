"""Checks that a .gguf file is a whole model: its header against the file, and the described model against its tensors.

transformers trusts the counts in a header: it builds as many blocks as it says, and initialises missing tensors at random. So
the blocks are counted before a model is built, and all shapes are compared before it is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from lorakeet.errors import DataError, PackageMissing, Problems, one_message
from lorakeet.formats.files.gguf_header import GgufHeader, check_gguf
from lorakeet.models.files.foreign_code import read_native
from lorakeet.models.files.quantized import skeleton
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.files.validate import require_sizes

ARCHITECTURE = "general.architecture"
_BLOCK = re.compile(r"blk\.(\d+)\.")
_ROTARY = ("rope_freqs.", "rope_factors")  # of Llama 3.1 and later, and of long Phi-3
_ADVICE = "Fetch the file again, or use the model's safetensors folder."


def require_gguf(path: Path) -> GgufHeader:
    """Returns the checked header of the .gguf model `path`; afterwards other packages may read the file.

    Raises EnvironmentProblem if a package is missing, DataError if the header does not match the file, has no architecture, or
    has more blocks than the tensors.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise PackageMissing(f"Reading {path.name} needs the package {package}", "lorakeet[gguf]", [package])
    header = check_gguf(path)
    architecture = header.values.get(ARCHITECTURE)
    if not isinstance(architecture, str) or not architecture:
        raise DataError(f"{path} has no {ARCHITECTURE}, so that its kind of model is unknown. {_ADVICE}")
    parts = header.values.get("split.count")
    if isinstance(parts, int) and parts > 1:
        join = "llama-gguf-split --merge FIRST-PART OUT.gguf"
        raise DataError(f"{path} is one of {parts} parts of a model. Join them, then name the whole: {join}")
    blocks = header.values.get(f"{architecture}.block_count")
    found = {match.group(1) for name in header.tensors if (match := _BLOCK.match(name))}
    if not isinstance(blocks, int) or isinstance(blocks, bool) or not 0 < blocks <= len(found):
        raise DataError(
            f"{path} has tensors of {len(found):,} blocks, but {architecture}.block_count is {_shown(blocks)}. {_ADVICE}"
        )
    return header


def config_of_gguf(path: Path) -> Any:
    """Returns the configuration of a .gguf model from its header, checked against the shapes of its tensors.

    Raises the errors of `require_gguf`, and DataError with every tensor that is missing or has another size. A file that has not
    changed since is not checked again: its tokenizer alone takes seconds.
    """
    if not path.is_file():
        return _checked_config(path, 0, 0)
    about = path.stat()
    return copy.deepcopy(_checked_config(path, about.st_mtime_ns, about.st_size))


@lru_cache(maxsize=4)
def _checked_config(path: Path, changed: int, size: int) -> Any:
    header = require_gguf(path)
    if rotary := sorted(name for name in header.tensors if name.startswith(_ROTARY)):
        raise DataError(
            f"{path} scales its rotary positions by {rotary[0]}, which transformers does not read from GGUF: the model would "
            "compute something else. Use the model's safetensors folder."
        )
    with reading(path):
        config: Any = read_native(AutoConfig, path.parent, gguf_file=path.name)
        config.name_or_path = str(path)  # what messages about it name; a saved configuration does not have it
        require_sizes(path, config)
        _check_shapes(path, header, config)
    return config


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """A context for transformers to read the .gguf file `path`: without progress bars, its errors become DataError."""
    advice = (
        "The file may be damaged (fetch it again), or of an architecture that transformers does not read from GGUF (use the "
        "model's safetensors folder)."
    )
    silent = contextlib.redirect_stderr(io.StringIO())  # its progress bar ignores the settings
    with one_message(f"{path} cannot be read", advice, passing=(OSError,)), quiet_transformers(), silent:
        yield


def _check_shapes(path: Path, header: GgufHeader, config: Any) -> None:
    """Raises DataError with every parameter of the described model that the file lacks or has in another size."""
    problems = Problems(f"{path} does not contain the model that its header describes", DataError, remedy=_ADVICE)
    model = skeleton(config)
    processor = TENSOR_PROCESSORS.get(str(header.values[ARCHITECTURE]), TensorProcessor)(config=config.to_dict())
    names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    parameters = dict(model.named_parameters())
    tied = getattr(model, "all_tied_weights_keys", {})
    for stored, name in names.items():
        slot, parameter = header.tensors.get(stored), parameters.get(name)
        if (
            parameter is None or parameter.dim() > 2 or "_exps" in stored
        ):  # experts: a tensor of the file has parts of several parameters
            continue
        if slot is None and name not in tied:
            problems.add(f"{path}: tensor {stored!r} is missing.")
        elif slot is not None and math.prod(slot.shape) != parameter.numel():
            wanted, shape = ("×".join(map(str, each.shape)) for each in (parameter, slot))
            problems.add(f"{path}: tensor {stored!r} is {shape}; the header describes a model with {wanted}.")
    problems.raise_if_any()


def _shown(value: object) -> str:
    return "missing" if value is None else f"{value:,}" if isinstance(value, int) else repr(value)
