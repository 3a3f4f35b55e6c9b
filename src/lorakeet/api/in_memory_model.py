"""A transformers model in memory as a folder: runs, merges and certificates read files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from lorakeet.api.arguments import given_as
from lorakeet.errors import ConfigError
from lorakeet.kernels.cache import cache_folder
from lorakeet.models.inject import adapter_names
from lorakeet.models.text.load import load_tokenizer
from lorakeet.train.durable import new_folder


def saved_model(model: Any, tokenizer: Any, folder: str | Path | None) -> Path:
    """The folder of a transformers model with its tokenizer: written at `folder`, or once in the cache, named by its content.

    Without `tokenizer` it is that of the folder from which the model was loaded. Raises ConfigError for what is no such model.
    """
    if hasattr(model, "peft_config"):
        raise ConfigError("The model carries adapters of PEFT. Take them with lk.from_peft, and load its base: model.unload().")
    if isinstance(model, nn.Module) and adapter_names(model):
        raise ConfigError("The model carries adapters of lk.attach. Take them with lk.adapter_of, then lk.detach them.")
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        what = "expected a name, a path, or a transformers model. lk.attach takes any nn.Module."
        raise ConfigError(f"model is {given_as(model)}; {what}")
    if empty := [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]:
        raise ConfigError(f"{len(empty)} tensors of the model are on device meta, without numbers: {empty[0]}. Load its weights.")
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    path = cache_folder() / "models" / _digest(model, tokenizer) if folder is None else Path(folder)
    if folder is None and (path / "config.json").is_file():
        return path
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"folder is {path}, which exists already. Choose a new one.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(path) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return path


def _tokenizer_of(model: Any) -> Any:
    named = Path(str(getattr(model, "name_or_path", "") or ""))
    if not (named / "tokenizer_config.json").is_file():
        raise ConfigError("The model in memory has no tokenizer beside it. Give one: lk.load(model, tokenizer=…).")
    return load_tokenizer(named)


def _digest(model: Any, tokenizer: Any) -> str:
    """A hash of the configurations, of the tokenizer's files and of every tensor."""
    found = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    if (generation := getattr(model, "generation_config", None)) is not None:
        found.update(generation.to_json_string().encode())
    with TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        for file in sorted(Path(place).rglob("*")):
            found.update(file.name.encode() + (file.read_bytes() if file.is_file() else b""))
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:24]
