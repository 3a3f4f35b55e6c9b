"""How a model on this machine is quantised, and which model its own record says that it was made from; nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lorakeet.formats.files.gguf_header import check_gguf
from lorakeet.formats.files.json_object import read_object
from lorakeet.models.files.source import on_this_machine
from lorakeet.models.files.stored_tensors import method_of
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.gptq_config import METHOD, OLD_CONFIG

_PLAIN = ("F32", "F16", "BF16", "F64")
_CARD = "README.md"
_HUB = "https://huggingface.co/"
# Where a .gguf file says of which repository its weights are; general.base_model.… is what that one was tuned from.
_GGUF_ORIGINS = ("general.source.huggingface.repository", "general.source.repo_url", "general.source.url")


def packed_folder(folder: Path) -> str:
    """How the weights in a model folder are quantised: gptq, nf4, int8, …; empty where they are not, or it is no folder."""
    if not (folder / "config.json").is_file():
        return ""
    config = read_object(folder / "config.json", expected="the settings of a model")
    found = method_of(config.get("quantization_config") or {})
    return found or (METHOD if (folder / OLD_CONFIG).is_file() else "")


def stored_as(spec: ModelSpec) -> str:
    """How the model that `spec.path` names is quantised on disk: "gguf" for a .gguf file with packed matrices.

    Of a folder it is `packed_folder`. Empty where it is not quantised, and where it is not on this machine.
    """
    place = on_this_machine(spec)
    if place is None or place.is_dir():
        return packed_folder(place) if place else ""
    if place.suffix.lower() != ".gguf":
        return ""
    slots = check_gguf(place).tensors.values()
    return "gguf" if any(slot.kind not in _PLAIN for slot in slots if len(slot.shape) > 1) else ""


def origin_of(spec: ModelSpec) -> str:
    """What a quantised model's own record calls the model that it was made from: a hub id or a path; empty without a record.

    In a folder it is the model card's `base_model`, in a .gguf file general.source.….
    """
    place = on_this_machine(spec)
    if place is None:
        return ""
    if place.is_file():
        found = check_gguf(place).values
        named = next((value for name in _GGUF_ORIGINS if isinstance(value := found.get(name), str) and value.strip()), "")
        return named.removeprefix(_HUB).strip("/") if named.startswith(_HUB) or "://" not in named else ""
    facts = card_facts(place)
    base = facts.get("base_model")
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    return base if isinstance(base, str) and facts.get("base_model_relation", "quantized") == "quantized" else ""


def card_facts(folder: Path) -> Mapping[str, Any]:
    """The front matter of the model card (README.md) in `folder`; empty where there is none, or it cannot be read."""
    try:
        text = (folder / _CARD).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return {}
    return front if isinstance(front, dict) else {}


def packed_card(model: str, method: str) -> str:
    """The model card of a folder that is `model` packed: where it comes from, for `origin_of` and for model hubs."""
    place = Path(model).expanduser()
    named = str(place.resolve()) if place.exists() else model
    front = yaml.safe_dump({"base_model": named, "base_model_relation": "quantized"}, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n`{named}` with its linear layers in {method}, written by lorakeet quantize.\n"
