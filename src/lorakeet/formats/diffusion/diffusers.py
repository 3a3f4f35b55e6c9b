"""diffusers' LoRA files (pytorch_lora_weights.safetensors): keys begin with the component of the pipeline.

Read in its three spellings; written in the first:

    unet.PATH.lora_A.weight               unet.PATH.lora.down.weight                   unet.….processor.to_q_lora.down.weight
    text_encoder.PATH.lora_B.weight       text_encoder.PATH.lora_linear_layer.up.weight   text_encoder.….to_q_lora.up.weight

The scale is 1 (alpha = rank), unless the header's `lora_adapter_metadata` has each component's LoraConfig, or there are `.alpha`
tensors. Written files have the scale multiplied into B, and alpha = rank in the header too. So programs that do not read the
header, and those that guess one alpha for mixed ranks, get the same ΔW.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.math import Kind
from lorakeet.errors import ConfigError, DataError, Problems, nearest, reader
from lorakeet.formats.components import COMPONENTS, canonical_path, component_of
from lorakeet.formats.files.json_object import parse_object
from lorakeet.formats.files.safetensors_file import SafeFile, open_safetensors, save_tensors
from lorakeet.formats.files.tensors import factor_problem, read_tensors
from lorakeet.formats.limits import check_supported, check_uniform_dora, metadata_without_peft
from lorakeet.formats.peft.peft_config import PeftConfig, parse_config

MODEL_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
NAME, SUFFIX, WEIGHTS, MAGIC = "diffusers", ".safetensors", "", b""  # as `AdapterFormat` says
_SLOT = re.compile(
    r"(?P<path>.+?)(?P<processor>\.processor)?"
    r"(?:\.(?P<old>to_(?:q|k|v|out))_lora\.(?P<side>down|up)\.weight"
    r"|\.(?P<slot>lora_A\.weight|lora_B\.weight|(?:lora|lora_linear_layer)\.(?:down|up)\.weight|alpha"
    r"|lora_magnitude_vector(?:\.weight)?))"
)
_OTHER_FACTOR = re.compile(r"lora\.(?:down|up)\.weight|to_(?:q|k|v|out)_lora\.")
_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def parse_key(name: str) -> tuple[str, str] | None:
    """The module path and "A", "B", "alpha" or "magnitude" of a key; None for a key that is not diffusers'."""
    match = _SLOT.fullmatch(name)
    if match is None:
        return None
    if match["old"]:
        in_clip = component_of(name) in ("text_encoder", "text_encoder_2")
        own = _CLIP[match["old"]] if in_clip else {"to_out": "to_out.0"}.get(match["old"], match["old"])
        return f"{match['path']}.{own}", "A" if match["side"] == "down" else "B"
    slot = match["slot"]
    part = "alpha" if slot == "alpha" else "magnitude" if "magnitude" in slot else "A" if "A" in slot or "down" in slot else "B"
    return match["path"] + (match["processor"] or ""), part


def owns(tensor: str) -> bool:
    """True for the names of diffusers' tensors."""
    return parse_key(tensor) is not None


@reader("an adapter")
def read(path: Path, /, **_unused: object) -> Adapter:
    """The adapter in the file `path`. DataError and ConfigError list everything that cannot be understood."""
    file = open_safetensors(path)
    problems = Problems(f"The adapter in {path} cannot be read", DataError)
    groups: dict[str, dict[str, Tensor]] = {}
    named: dict[tuple[str, str], str] = {}
    for name, tensor in read_tensors(file, problems).items():
        found = parse_key(name)
        module = "" if found is None else canonical_path(found[0])
        if found is None:
            problems.add(f"{path}: {name} {tuple(tensor.shape)} is a kind of tensor that is not known here.")
        elif not component_of(module):
            known = ", ".join(COMPONENTS)
            problems.add(f"{path}: {name} begins with no component; expected one of {known}.{nearest(name, COMPONENTS)}")
        elif (other := named.setdefault((module, found[1]), name)) != name:
            problems.add(f"{path}: {name} and {other} are two spellings of one tensor; expected one. Fetch the file again.")
        else:
            groups.setdefault(module, {})[found[1]] = tensor
    for wrong in _lost_in_diffusers(file):
        problems.add(f"{path}: {wrong}")
    dora = [module for module, slots in groups.items() if "magnitude" in slots]
    if dora and len(dora) < len(groups):
        problems.add(
            f"{path}: {len(dora)} of {len(groups)} modules have a DoRA magnitude ({dora[0]}); diffusers knows DoRA for all "
            "or none. Fetch the file again."
        )
    configs = _configs(file)
    pairs: dict[str, Pair] = {}
    for module, slots in sorted(groups.items()):
        pair = _pair(module, slots, configs, any("alpha" in group for group in groups.values()))
        if isinstance(pair, str):
            problems.add(f"{path}: {pair}")
        else:
            pairs[module] = pair
    problems.raise_if_any()
    metadata = {key: value for key, value in file.metadata.items() if key not in (METADATA_KEY, "format")}
    return Adapter(pairs, metadata=metadata)


def _lost_in_diffusers(file: SafeFile) -> list[str]:
    """What is wrong where a component has tensors in PEFT's spelling and in others: diffusers' loader of UNets and transformers
    ignores the others if the first of all is lora_A.
    """
    found = []
    order = sorted(file.tensors, key=lambda name: file.tensors[name].begin)
    for component in ("unet", "transformer"):
        own = [name for name in order if name.startswith(f"{component}.")]
        others = [name for name in own if _OTHER_FACTOR.search(name)]
        if own and "lora_A" in own[0] and others:
            found.append(
                f"diffusers ignores {len(others)} tensors, such as {others[0]}: they are in another spelling than {own[0]}, the "
                f"first of its {component}. Load the file in the program that made it, and save it anew."
            )
    return found


def _configs(file: SafeFile) -> dict[str, PeftConfig]:
    """Each component's LoraConfig from the header."""
    text = file.metadata.get(METADATA_KEY)
    if text is None:
        return {}
    data = parse_object(text, f"{file.path}: the metadata key {METADATA_KEY!r}", expected="a table")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in data.items():
        component, _, name = key.partition(".")
        if name and component in COMPONENTS:
            parts.setdefault(component, {})[name] = value
        else:  # written by one model's save_lora_adapter: the keys of its LoraConfig alone
            parts.setdefault("unet", {})[key] = value
    return {component: parse_config(part, f"{file.path}: {component}") for component, part in parts.items()}


def _pair(module: str, slots: Mapping[str, Tensor], configs: Mapping[str, PeftConfig], alphas: bool) -> Pair | str:
    missing = [f"lora_{side}" for side in ("A", "B") if side not in slots]
    if missing:
        return f"{module} has {', '.join(sorted(slots))} but no {' and no '.join(missing)}."
    A, B = slots["A"], slots["B"]
    if wrong := factor_problem(module, A, B):
        return wrong
    kind: Kind = "conv2d" if A.dim() == 4 else "linear"
    component, _, rest = module.partition(".")
    config = configs.get(component)
    magnitude = slots.get("magnitude")
    if magnitude is not None and magnitude.numel() != B.shape[0]:
        return f"{module} has a DoRA magnitude {tuple(magnitude.shape)}; B {tuple(B.shape)} needs {B.shape[0]} numbers."
    if config is not None and (magnitude is not None) != config.dora:
        count = "no" if magnitude is None else "a"
        return f"{module} has {count} DoRA magnitude, and {METADATA_KEY} says use_dora {config.dora}."
    flat = None if magnitude is None else magnitude.flatten()
    if alphas or config is None:
        alpha = _alpha(module, slots, config, alphas)
        return alpha if isinstance(alpha, str) else Pair(A, B, alpha, kind, magnitude=flat)
    short = rest.removeprefix("text_model.")
    if config.rank_of(short) != A.shape[0] and config.rank_of(rest) == A.shape[0]:
        short = rest  # written with an older transformers, whose CLIP has the part text_model
    if config.rank_of(short) != A.shape[0]:
        return f"{module} has rank {A.shape[0]}, but {METADATA_KEY} says {config.rank_of(short)}, so its scale is uncertain."
    return Pair(A, B, config.alpha_of(short), kind, config.scale_rule, flat)


def _alpha(module: str, slots: Mapping[str, Tensor], config: PeftConfig | None, alphas: bool) -> float | str:
    """The alpha of a pair without a LoraConfig for its component, or what is wrong."""
    if not alphas:
        return float(slots["A"].shape[0])
    if config is not None:
        return f"{module}: there are alpha tensors and a {METADATA_KEY} for the component; only one of them can be right."
    if "alpha" not in slots:
        return f"{module} has no alpha, and other modules have one, so its scale is unknown. Fetch the file again."
    if slots["alpha"].numel() != 1:
        return f"{module}.alpha has the shape {tuple(slots['alpha'].shape)}; expected one number."
    return float(slots["alpha"])


def write(adapter: Adapter, path: Path, **_unused: object) -> None:
    """Writes `adapter` to the file `path`, which appears whole or not at all; the same adapter gives the same bytes.

    ConfigError names what diffusers' format cannot hold.
    """
    check_supported(adapter, "diffusers", kinds=("linear", "conv2d"), dora=True)
    check_uniform_dora(adapter, "diffusers")
    strange = [module for module in adapter.pairs if not component_of(module)]
    if strange:
        raise ConfigError(
            f"{len(strange)} pairs belong to no component of a diffusers pipeline ({', '.join(COMPONENTS)}): "
            f"{', '.join(strange[:3])}. An adapter of a language model goes --to peft, gguf or mlx."
        )
    tensors: dict[str, Tensor] = {}
    for module, pair in adapter.pairs.items():
        B = pair.B.float()
        tensors[f"{module}.lora_A.weight"] = pair.A.float()
        tensors[f"{module}.lora_B.weight"] = B if pair.scale == 1 else B * pair.scale
        if pair.magnitude is not None:
            shape = (1, -1, 1, 1) if pair.kind == "conv2d" else (-1,)
            tensors[f"{module}.lora_magnitude_vector"] = pair.magnitude.float().reshape(shape)
    header = {"format": "pt", **metadata_without_peft(adapter), METADATA_KEY: json.dumps(_lora_configs(adapter), sort_keys=True)}
    save_tensors(path, tensors, metadata=header)


def _lora_configs(adapter: Adapter) -> dict[str, Any]:
    """The LoraConfig of each component, with the component before its keys; patterns are whole paths without text_model."""
    found: dict[str, Any] = {}
    for component in sorted({component_of(module) for module in adapter.pairs}):
        own = {module: pair for module, pair in sorted(adapter.pairs.items()) if component_of(module) == component}
        ranks = {module.partition(".")[2].removeprefix("text_model."): pair.rank for module, pair in own.items()}
        counts = sorted(ranks.values())
        rank = max(set(counts), key=lambda value: (counts.count(value), -value))
        pattern = {f"^{re.escape(module)}": value for module, value in ranks.items() if value != rank}
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": dict(pattern),
            "target_modules": sorted(ranks),
            "use_dora": any(pair.magnitude is not None for pair in own.values()),
        }
        found |= {f"{component}.{key}": value for key, value in config.items()}
    return found
