"""Checks a model folder against its config.json: weights that are missing, of another shape or not finite.

transformers initialises such weights at random, or fails with its own table. Every way of loading (in memory, packed, streamed)
reports its findings here, so that the user gets the same message.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from lorakeet.errors import DataError, LorakeetError, Problems, nearest, shortened
from lorakeet.formats.files.json_object import read_object
from lorakeet.formats.files.safetensors_file import SafeFile

_DECODERS = ("gpt_neox", "gpt_neox_japanese")  # whose `is_decoder` says nothing
_MOST_LAYERS, _LARGEST_SIZE = 10_000, 1 << 33
_COUNT = re.compile(
    r"((num|n)_)?((hidden|decoder|encoder|nextn_predict|mtp|local|routed|single|transformer)_)*(layers?|blocks|depth|experts)"
    r"(_per_block)?"
)
_SIZE = re.compile(
    r"n_embd|n_head|n_inner|n_ctx|n_positions|d_model|d_ff|dim|(num|n)_(\w+_)?(heads|head_kv|groups)|max_position_embeddings"
    r"|(\w+_)?(hidden|intermediate|vocab|embedding|ffn)_(size|dim)|(\w+_)?head_dim"
)
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # by weight: found shape, and that of config.json
_SHOWN = 8  # weights in a message; a wrong config.json affects all
_CONVERSION = (
    "We encountered some issues during automatic conversion"  # the start of transformers' message about a failed conversion
)


def require_architecture(folder: Path) -> None:
    """Raises DataError if config.json names no architecture, or one that transformers lacks."""
    file = folder / "config.json"
    settings = read_object(file, expected="the settings of a model")
    kind = settings.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise DataError(f"{file} names no model_type, so what kind of model it describes is not known. Fetch it again.")
    if kind not in CONFIG_MAPPING:
        own = " The folder names code of its own (auto_map), which is never run." if "auto_map" in settings else ""
        raise DataError(
            f"{file} says that model_type is '{kind}', which is no kind of model that transformers {transformers.__version__} "
            f"knows.{nearest(kind, CONFIG_MAPPING)}{own} Correct it, or update: pip install --upgrade transformers"
        )


def require_text_model(where: object, config: Any) -> None:
    """Raises DataError if the model of this configuration does not continue texts. `where` names its file."""
    kind, text = config.model_type, config.get_text_config()
    why = "does not write text: transformers has no causal language model of it"
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        why = "is an encoder-decoder: it writes with another part than it reads with, and cannot continue a text"
    elif getattr(config, "is_decoder", True) is False and kind not in _DECODERS:
        why = "is an encoder: each of its tokens sees the tokens after it, so it cannot continue a text"
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        if hasattr(text, "vocab_size"):
            return
        why = "has no text part that can be found: its configuration counts no tokens (vocab_size)"
    raise DataError(
        f"{where} describes a model of type '{kind}', which {why}. Name a language model, such as a llama, qwen or mistral "
        "folder."
    )


def auto_class_of(config: Any) -> Any:
    """The Auto class of transformers for the model of this configuration; a wrapper around a language model may have one of its
    own.
    """
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM


def require_sizes(where: object, config: Any) -> None:
    """Raises DataError for sizes that no model has: building one of 10^29 layers would never end. `where` names the file.

    `config`: a configuration of transformers with those of its parts, or configurations as mappings by name.
    """
    problems = Problems(f"{where} describes no model that can be built", DataError, remedy="Correct it, or fetch it again.")
    parts = getattr(config, "sub_configs", ())
    held = config if isinstance(config, Mapping) else {"": config, **{name: getattr(config, name, None) for name in parts}}
    for part, own in held.items():
        settings = own if isinstance(own, Mapping) else getattr(own, "__dict__", {})
        for key, value in settings.items():
            most = _MOST_LAYERS if _COUNT.fullmatch(key) else _LARGEST_SIZE if _SIZE.fullmatch(key) else None
            if most is None or not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if not (isinstance(value, int) and 0 <= value <= most):
                name = f"{part}.{key}" if part else key
                shown = shortened(str(_plain(value)), 80)
                problems.add(f"{where}: {name} is {shown}; expected a whole number from 0 to {most:,}.")
    problems.raise_if_any()


def _plain(value: float) -> object:
    """The number, or its size where Python will not write it out."""
    return value if isinstance(value, float) or value.bit_length() < 4000 else f"a number of {value.bit_length():,} bits"


def require_whole(source: Path, kind: str, *, misfits: Shapes, missing: Iterable[str]) -> None:
    """Raises DataError for weights that are missing, or of another shape than config.json says."""
    problems, lost = Problems(f"{source} is no whole '{kind}' model", DataError), sorted(missing)
    if misfits:
        others = [f"{name} is {_size(found)}, expected {_size(wanted)}" for name, (found, wanted) in sorted(misfits.items())]
        problems.add(
            f"{source} has {len(others)} weights of other shapes than its config.json says: {_some(others)}. config.json and "
            "weights belong to different models; fetch both again."
        )
    if lost:
        problems.add(
            f"{source} lacks {len(lost)} weights of its '{kind}' architecture: {_some(lost)}; they would be random numbers. "
            "Fetch the model again, or check architectures in its config.json."
        )
    problems.raise_if_any()


def misfits_in(report: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns the weights of another shape in transformers' loading report."""
    return {name: (tuple(found), tuple(wanted)) for name, found, wanted in report["mismatched_keys"]}


@contextmanager
def loading(source: Path, kind: str, files: Mapping[str, SafeFile]) -> Iterator[None]:
    """A context for transformers to load a model: whatever it raises becomes the DataError of `refused`."""
    try:
        yield
    except LorakeetError:
        raise
    except Exception as error:
        raise refused(source, kind, files, error) from error


def refused(source: Path, kind: str, files: Mapping[str, SafeFile], error: Exception) -> DataError:
    """Returns the DataError for an error of transformers while loading."""
    odd = _odd_ones(files)
    if odd:
        others = [f"{name} is {_size(found)}, similar ones are {_size(usual)}" for name, (found, usual) in sorted(odd.items())]
        return DataError(f"{source} has {len(others)} weights that do not go with the others: {_some(others)}. Fetch it again.")
    first = first_line(error)
    why = "its weights do not go together as its code wants" if first.startswith(_CONVERSION) else first
    return DataError(
        f"The '{kind}' model in {source} cannot be loaded for text generation: {why}. config.json and weights may belong to "
        "different models; fetch both again."
    )


def first_line(error: Exception) -> str:
    """Returns the first line of another library's error message, with its type."""
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return line if line.startswith(_CONVERSION) else ": ".join([type(error).__name__, *([line] if line else [])])


def require_finite(tensor: Tensor, name: str) -> None:
    """Raises DataError if a tensor has NaN or infinite values, in one pass. One number may be infinite: the bound of a clamp."""
    if not tensor.is_floating_point() or not tensor.numel() or (not tensor.dim() and not bool(tensor.isnan())):
        return
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # torch does not compare 8-bit numbers
    low, high = torch.aminmax(wide)
    if not (bool(low.isfinite()) and bool(high.isfinite())):
        wrong = int((~wide.isfinite()).sum())
        raise DataError(f"{name} has {wrong:,} values of {tensor.numel():,} that are NaN or infinite. Fetch the model again.")


def _odd_ones(files: Mapping[str, SafeFile]) -> Shapes:
    """Returns tensors whose shape differs from most others of the same name in other blocks and experts."""
    kinds: dict[str, list[str]] = {}
    for name in files:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for names in kinds.values():
        shapes = {name: files[name].tensors[name].shape for name in names}
        (usual, count), *_ = Counter(shapes.values()).most_common()
        if count > len(names) / 2:
            found |= {name: (shape, usual) for name, shape in shapes.items() if shape != usual}
    return found


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "one number"


def _some(texts: list[str]) -> str:
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more
