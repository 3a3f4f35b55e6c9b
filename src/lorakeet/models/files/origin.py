"""Reads how a local model is quantised, and from which model it was made according to its metadata; fetches nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lorakeet.disk import read_regular
from lorakeet.errors import ConfigError
from lorakeet.formats.files.gguf_header import check_gguf
from lorakeet.formats.files.json_object import read_object
from lorakeet.formats.files.yaml_mapping import parse_yaml
from lorakeet.models.files.source import on_this_machine
from lorakeet.models.files.stored_tensors import method_of
from lorakeet.models.spec import ModelSpec
from lorakeet.quant.gptq_config import METHOD, OLD_CONFIG

_PLAIN = ("F32", "F16", "BF16", "F64")
_README = "README.md"
_HUB = "https://huggingface.co/"
# Keys of a .gguf file for the repository of its weights; general.base_model.… is the model that it was tuned from.
_GGUF_ORIGINS = ("general.source.huggingface.repository", "general.source.repo_url", "general.source.url")


def packed_folder(folder: Path) -> str:
    """Returns how the weights of a model folder are quantised: gptq, nf4, int8, …; empty if they are not, or it is no folder."""
    if not (folder / "config.json").is_file():
        return ""
    config = read_object(folder / "config.json", expected="the settings of a model")
    found = method_of(config.get("quantization_config") or {})
    return found or (METHOD if (folder / OLD_CONFIG).is_file() else "")


def stored_as(spec: ModelSpec) -> str:
    """Returns how the model `spec.path` is quantised on disk: "gguf" for a .gguf file with packed matrices.

    For a folder it is `packed_folder`. Empty if it is not quantised, or not on this machine.
    """
    path = on_this_machine(spec)
    if path is None or path.is_dir():
        return packed_folder(path) if path else ""
    if path.suffix.lower() != ".gguf":
        return ""
    slots = check_gguf(path).tensors.values()
    return "gguf" if any(slot.kind not in _PLAIN for slot in slots if len(slot.shape) > 1) else ""


def origin_of(spec: ModelSpec) -> str:
    """Returns the model that a quantised model was made from, by its metadata: a hub id or a path; empty without it.

    In a folder it is the model card's `base_model`, in a .gguf file general.source.….
    """
    path = on_this_machine(spec)
    if path is None:
        return ""
    if path.is_file():
        found = check_gguf(path).values
        named = next((value for name in _GGUF_ORIGINS if isinstance(value := found.get(name), str) and value.strip()), "")
        return named.removeprefix(_HUB).strip("/") if named.startswith(_HUB) or "://" not in named else ""
    facts = readme_metadata(path)
    base = facts.get("base_model")
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    return base if isinstance(base, str) and facts.get("base_model_relation", "quantized") == "quantized" else ""


def readme_metadata(folder: Path) -> Mapping[str, Any]:
    """Returns the front matter of the model card (README.md) in `folder`; empty if it is missing or unreadable."""
    try:
        text = read_regular(folder / _README).decode()
        begins, front, _ = re.split(r"^---[^\S\n]*$", text, maxsplit=2, flags=re.MULTILINE)
        front = parse_yaml(front, folder / _README) if not begins.strip() else None
    except (OSError, UnicodeDecodeError, ConfigError, ValueError):
        return {}
    return front if isinstance(front, dict) else {}


def base_form(spec: ModelSpec) -> str:
    """How the weights of a base are stored and packed, in words: of what a run really trains on. Empty for a plain folder."""
    stored, path = stored_as(spec), on_this_machine(spec)
    words = [f"revision {spec.revision}"] if spec.revision else []
    if stored or (path is not None and path.is_file() and path.suffix.lower() == ".gguf"):
        kinds = {"gguf": "a .gguf file of quantised weights", "": "a .gguf file"}
        words.append(kinds.get(stored, f"quantised on disk: {stored}"))
        if origin := origin_of(spec):
            words.append(f"made from {Path(origin).name if Path(origin).is_absolute() else origin}")
    if (packed := spec.quantize.method) != "none":
        words.append(f"its linear layers in {packed} while it trained")
    return ", ".join(words)


def packed_readme(model: str, method: str) -> str:
    """Returns the model card of a folder with `model` packed: its origin, for `origin_of` and for model hubs."""
    path = Path(model).expanduser()
    named = str(path.resolve()) if path.exists() else model
    front = yaml.safe_dump({"base_model": named, "base_model_relation": "quantized"}, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n`{named}` with its linear layers in {method}, written by lorakeet quantize.\n"
