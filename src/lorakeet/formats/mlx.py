"""mlx-lm's adapter folder: adapters.safetensors and adapter_config.json.

    PATH.lora_a   (in, rank)     A transposed
    PATH.lora_b   (rank, out)    B transposed
    PATH.m        (out,)         DoRA

ΔW = scale·(lora_a·lora_b)ᵀ with one `scale` and one `rank` for the whole adapter, and no alpha. If pairs differ, their scales are
multiplied into lora_b (scale 1), and lower ranks are padded with zeros; neither changes ΔW.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.math import alpha_for
from lorakeet.errors import ConfigError, DataError, Problems, reader
from lorakeet.formats.components import component_of
from lorakeet.formats.files.json_object import read_object
from lorakeet.formats.files.safetensors_file import open_safetensors, save_tensors, save_text
from lorakeet.formats.files.tensors import missing_slots, read_tensors
from lorakeet.formats.limits import check_supported, check_uniform_dora, metadata_without_peft

MODEL_NAME = "adapters.safetensors"
CONFIG_NAME = "adapter_config.json"
SLOTS = ("lora_a", "lora_b", "m")
NAME, SUFFIX, WEIGHTS, MAGIC = "mlx", "", MODEL_NAME, b""  # as `AdapterFormat` says


def owns(tensor: str) -> bool:
    """True for the names of mlx-lm's tensors."""
    return tensor.removesuffix(".weight").endswith(tuple(f".{slot}" for slot in SLOTS))


@reader("an adapter")
def read(folder: Path, /, **_unused: object) -> Adapter:
    """The adapter in `folder`. DataError lists everything that cannot be understood."""
    path = folder / CONFIG_NAME
    config = read_object(path, expected=f"the configuration that mlx-lm writes beside {MODEL_NAME}")
    problems = Problems(f"The adapter in {folder} cannot be read", DataError)
    scale = _scale(config, path, problems)
    file = open_safetensors(folder / MODEL_NAME)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(file, problems).items():
        module, _, slot = name.rpartition(".")
        if module and slot in SLOTS:
            groups.setdefault(module, {})[slot] = tensor
        else:
            problems.add(f"{file.path}: {name} {tuple(tensor.shape)} is a kind of tensor that is not known here.")
    pairs: dict[str, Pair] = {}
    for module, slots in sorted(groups.items()):
        pair = _pair(module, slots, scale, dora=config.get("fine_tune_type") == "dora")
        if isinstance(pair, str):
            problems.add(f"{file.path}: {pair}")
        else:
            pairs[module] = pair
    _check_reach(config, pairs, path, problems)
    problems.raise_if_any()
    metadata = {key: value for key, value in file.metadata.items() if key != "format"}
    return Adapter(pairs, base=str(config.get("model") or ""), metadata=metadata)


def _scale(config: Mapping[str, Any], path: Path, problems: Problems) -> float:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        problems.add(f"{path}: fine_tune_type is {kind!r}; only 'lora' and 'dora' are adapters.")
        return 1.0
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not abs(scale) <= sys.float_info.max:
        hint = " Its 'alpha' is no key of mlx-lm." if isinstance(parameters, dict) and "alpha" in parameters else ""
        problems.add(f"{path}: lora_parameters.scale is {_shown(scale)}; expected a finite number.{hint}")
        return 1.0
    return float(scale)


def _shown(value: object) -> str:
    return repr(value) if len(repr(value)) < 80 else f"{repr(value)[:60]}…"


def _check_reach(config: Mapping[str, Any], pairs: Mapping[str, Pair], path: Path, problems: Problems) -> None:
    """Adds to `problems` if mlx-lm would give some modules no pair that have one in the file, by num_layers and keys."""
    count, parameters = config.get("num_layers"), config.get("lora_parameters")
    keys = parameters.get("keys") if isinstance(parameters, dict) else None
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        problems.add(f"{path}: lora_parameters.keys is {_shown(keys)}; expected a list of names, or null.")
        return
    if not isinstance(count, int) or isinstance(count, bool):
        problems.add(f"{path}: num_layers is {_shown(count)}; expected a whole number, or -1 for all layers.")
        return
    layers = {number for module in pairs if (number := _layer_number(module)) is not None}
    if 0 < count < len(layers):
        problems.add(f"{path}: num_layers is {count}, but {MODEL_NAME} has pairs in {len(layers)} layers. Correct it.")
    lost = [module for module in pairs if keys is not None and module not in keys and _inside_layer(module) not in keys]
    if lost:
        problems.add(f"{path}: lora_parameters.keys leaves out {len(lost)} modules with a pair, such as {lost[0]}. Correct it.")


def _pair(module: str, slots: Mapping[str, Tensor], scale: float, *, dora: bool) -> Pair | str:
    if ("m" in slots) != dora:
        kind = "'dora'" if dora else "'lora'"
        return f"{module} has {'an' if 'm' in slots else 'no'} m, DoRA's magnitude, and fine_tune_type is {kind}."
    if missing := missing_slots(module, slots, ("lora_a", "lora_b")):
        return missing
    a, b, m = slots["lora_a"], slots["lora_b"], slots.get("m")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or 0 in (*a.shape, *b.shape):
        return (
            f"{module} has lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)}; expected (in, rank) and (rank, out). "
            "Pairs on experts are not read from this format."
        )
    if m is not None and m.shape != b.shape[1:]:
        return f"{module} has m {tuple(m.shape)}; lora_b {tuple(b.shape)} needs {b.shape[1]} numbers."
    return Pair(a.t().contiguous(), b.t().contiguous(), alpha_for(scale, a.shape[1]), magnitude=m)


def write(adapter: Adapter, folder: Path, **_unused: object) -> None:
    """Writes `adapter` into `folder` (made if missing) so that mlx-lm loads it; the same adapter gives the same bytes.

    ConfigError names what the format cannot hold.
    """
    check_supported(adapter, "mlx", kinds=("linear",), dora=True)
    check_uniform_dora(adapter, "mlx")
    images = [module for module in adapter.pairs if component_of(module)]
    if images:
        raise ConfigError(f"{len(images)} pairs belong to an image model ({', '.join(images[:3])}), which mlx-lm does not have.")
    scales = {_rounded(pair.scale) for pair in adapter.pairs.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank = max(pair.rank for pair in adapter.pairs.values())
    tensors: dict[str, Tensor] = {}
    for module, pair in adapter.pairs.items():
        B = pair.B.float() if _rounded(pair.scale) == scale else pair.B.float() * pair.scale
        missing = rank - pair.rank
        tensors[f"{module}.lora_a"] = torch.nn.functional.pad(pair.A.float().t(), (0, missing)).contiguous()
        tensors[f"{module}.lora_b"] = torch.nn.functional.pad(B.t(), (0, 0, 0, missing)).contiguous()
        if pair.magnitude is not None:
            tensors[f"{module}.m"] = pair.magnitude.float()
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / MODEL_NAME, tensors, metadata={"format": "mlx", **metadata_without_peft(adapter)})
    keys = sorted({_inside_layer(module) for module in adapter.pairs})
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if any(pair.magnitude is not None for pair in adapter.pairs.values()) else "lora",
        "lora_parameters": {"dropout": 0.0, "keys": keys, "rank": rank, "scale": scale},
        "model": adapter.base,
        "num_layers": -1,  # all
    }
    save_text(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _rounded(scale: float) -> float:
    """12 digits: converting scale to alpha and back may change the last bit, which must not change what is written."""
    return float(f"{scale:.12g}")


def _layer_number(module: str) -> int | None:
    return next((int(part) for part in module.split(".")[:-1] if part.isdigit()), None)


def _inside_layer(module: str) -> str:
    """The name after the layer's number (self_attn.q_proj), or the whole path of a module outside the layers."""
    parts = module.split(".")
    numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else module
