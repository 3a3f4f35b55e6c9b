"""A base model on disk, for conversions: its configuration, and its modules' shapes from the headers of its files.

No model is loaded. A weight is read only if an adapter cannot be converted without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import DataError, Problems, nearest, reader
from lorakeet.formats.components import COMPONENTS, canonical_path
from lorakeet.formats.files.json_object import read_object
from lorakeet.formats.files.safetensors_file import SafeFile, open_safetensors

CONFIG = "config.json"


@dataclass(frozen=True)
class BaseModel:
    """A base on disk: configurations by component ("" for a language model), and the file of each weight."""

    path: Path
    configs: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, tuple[SafeFile, str]] = field(default_factory=dict)  # by module path

    def config(self, component: str = "") -> Mapping[str, Any]:
        """The configuration of one component; empty if there is none."""
        return self.configs.get(component, {})

    def shape(self, path: str) -> tuple[int, ...] | None:
        """The shape of the weight of the module at `path`; None if it is unknown."""
        found = self.weights.get(path)
        return None if found is None else found[0].tensors[found[1]].shape

    def weight(self, path: str) -> Tensor:
        """The weight of the module at `path`, in fp32."""
        file, name = self.weights[path]
        return file.read(name).float()


@reader("a base model")
def open_base(path: Path) -> BaseModel:
    """The base at `path`: a config.json, or a folder of one model or of a diffusers pipeline. DataError for anything else."""
    if path.suffix == ".json" and path.is_file():
        config = _config(path)
        return BaseModel(path, {_component(config): config})
    if not path.is_dir():
        raise DataError(f"--base {path} is neither a folder nor a .json file; expected a model's folder or its {CONFIG}.")
    folders = {name: path / name for name in COMPONENTS if (path / name / CONFIG).is_file()}
    if not folders and not (path / CONFIG).is_file():
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise DataError(f"--base {path} holds no {CONFIG}, only {inside}; expected a model's folder or its {CONFIG}.")
    configs: dict[str, Mapping[str, Any]] = {name: _config(folder / CONFIG) for name, folder in folders.items()}
    if not folders:
        config = _config(path / CONFIG)
        configs, folders = {_component(config): config}, {_component(config): path}
    weights: dict[str, tuple[SafeFile, str]] = {}
    for component, folder in folders.items():
        for part in sorted(folder.glob("*.safetensors")):
            file = open_safetensors(part)
            for name in file.tensors:
                if name.endswith(".weight"):
                    module = name.removesuffix(".weight")
                    weights[canonical_path(f"{component}.{module}" if component else module)] = (file, name)
    return BaseModel(path, configs, weights)


def _config(path: Path) -> dict[str, Any]:
    return read_object(path, expected="the configuration of a model")


def _component(config: Mapping[str, Any]) -> str:
    name = str(config.get("_class_name", ""))
    return "unet" if name.startswith("UNet") else "transformer" if "Transformer" in name else ""


def check_fits(adapter: Adapter, base: BaseModel) -> None:
    """Raises DataError listing every pair that has no module in `base`, or another shape."""
    if not base.weights:
        return
    trained_on = f" ({adapter.base})" if adapter.base else ""
    advice = f"If this is not the model that the adapter was trained on, name that one{trained_on} with --base."
    problems = Problems(f"The adapter does not fit {base.path}", DataError, remedy=advice)
    for path, pair in adapter.pairs.items():
        shape = base.shape(path)
        if pair.kind == "experts":
            continue
        if shape is None:
            problems.add(f"{path} is no module of {base.path}.{nearest(path, base.weights)}")
        elif _shape(pair) != shape:
            problems.add(f"{path} is a pair for a weight {_shape(pair)}; {base.path} has {shape} there.")
    problems.raise_if_any()


def _shape(pair: Pair) -> tuple[int, ...]:
    """The shape of the stored weight that `pair` changes."""
    out, *inner = pair.weight_shape
    return (*inner, out) if pair.kind in ("conv1d", "embedding") else pair.weight_shape
