"""A model in llama.cpp's layout: metadata keys from config.json, and the name and conversion of each stored tensor.

What a family needs is a line of `exporting/gguf_families`; what all have alike is here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import ConfigError, Problems, nearest
from lorakeet.exporting.gguf_families import ARCHITECTURES, Architecture, Target, Value, wide_head
from lorakeet.exporting.merged_tensors import Convert, Part
from lorakeet.formats.gguf import permute, permuted_heads, tensor_names

SHARED = (
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
)
# llama.cpp derives the scale of attention from these sizes where the family keeps one of its own in config.json.
_WIDE_GEMMA = {("gemma2", 46), ("gemma3_text", 62)}  # the 27B models: 1/sqrt(hidden/heads); all others 1/sqrt(head_dim)


@dataclass(frozen=True)
class ModelLayout:
    """A model's metadata in GGUF, and the tensors of the file; `notes` say what differs there."""

    model_type: str
    architecture: Architecture
    metadata: Mapping[str, Value]
    heads: int
    kv_heads: int
    rope: Mapping[str, Tensor]  # rope_freqs.weight and the like, made from config.json
    config: Mapping[str, Any] = field(default_factory=dict)  # of the text part
    notes: tuple[str, ...] = ()

    def parts(self, stored: Mapping[str, str], problems: Problems) -> dict[str, Part]:
        """The tensors of the file by GGUF name, from those of the folder: the name in transformers' model to that on disk.

        `problems` gets each that has no name in llama.cpp's architecture.
        """
        names = tensor_names(self.architecture.name, int(self.config["num_hidden_layers"]))
        found: dict[str, Part] = {}
        experts: dict[str, dict[int, str]] = {}
        for plain, on_disk in stored.items():
            rule, match = self._rule(plain)
            for target in rule:
                name = target.name or str(names.get_name(plain, try_suffixes=(".weight", ".bias")) or "")
                if match is not None:
                    name = name.replace("{n}", match["n"])
                if not name:
                    problems.add(f"{on_disk} has no name in llama.cpp's {self.architecture.name}.")
                elif match is not None and "e" in match.groupdict():
                    experts.setdefault(name, {})[int(match["e"])] = on_disk
                else:
                    found[name] = Part((on_disk,), self._convert(plain, target), by_matrix="_exps." in name)
        for name, by_number in experts.items():
            if sorted(by_number) != list(range(len(by_number))):
                problems.add(f"{name} lacks some of its experts: the folder has {sorted(by_number)}.")
            found[name] = Part(tuple(by_number[number] for number in sorted(by_number)), stacked=True)
        return found

    def _rule(self, plain: str) -> tuple[tuple[Target, ...], re.Match[str] | None]:
        for rule in self.architecture.rules:
            if match := _pattern(rule.name).fullmatch(plain):
                return rule.targets, match
        return (Target(""),), None

    def _convert(self, plain: str, target: Target) -> Convert | None:
        """The conversion of the tensor that transformers calls `plain`; None if it is written as stored."""
        own = target.convert
        if own is not None:
            return lambda tensor: own(tensor, self.config)
        module, _, leaf = plain.rpartition(".")
        heads = permuted_heads(self.model_type, module, self.heads, self.kv_heads)
        if heads and leaf in ("weight", "bias"):
            return lambda tensor: permute(tensor, heads)
        plain_norm = module.endswith(self.architecture.plain_norms)
        if self.architecture.norm_plus_one and module.endswith("norm") and not plain_norm:
            return lambda tensor: tensor + 1
        return None


@lru_cache(maxsize=256)
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{e\}", r"(?P<e>\d+)"))


def model_layout(config: Mapping[str, Any], folder: object) -> ModelLayout:
    """The layout of the model with this config.json. ConfigError lists everything that llama.cpp cannot compute."""
    text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else dict(config)
    kind = str(text.get("model_type", ""))
    architecture = ARCHITECTURES.get(kind)
    if architecture is None:
        raise ConfigError(
            f"{folder} is a model of type '{kind}', whose GGUF layout is not known here; known are {', '.join(ARCHITECTURES)}."
            f"{nearest(kind, ARCHITECTURES)} Merge it (lorakeet merge) and use llama.cpp's own converter."
        )
    if architecture.variant is not None:
        architecture = architecture.variant(text)
    problems, notes = Problems(f"{folder} cannot be written as GGUF"), []
    missing = [theirs for _, theirs in SHARED if not isinstance(text.get(theirs), int)]
    if "moe_intermediate_size" in text and "intermediate_size" in missing:  # every block has experts
        missing.remove("intermediate_size")
    if missing:
        raise ConfigError(f"{folder}/config.json lacks {', '.join(missing)}; expected whole numbers.")
    heads = int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or text["hidden_size"] // heads)
    pairs = (*SHARED, *architecture.metadata)
    found: dict[str, Value] = {ours: text[theirs] for ours, theirs in pairs if text.get(theirs)}
    found |= {
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": float(text.get("rms_norm_eps", 1e-6)),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(head_dim * _rotated(text)),
    }
    _check_computed(text, architecture, problems)
    if kind in ("gemma2", "gemma3_text"):
        _check_gemma(text, kind, head_dim, problems)
    if not architecture.windows and _slides(text):
        notes.append(
            f"The model attends to the last {text['sliding_window']} tokens only, llama.cpp's {architecture.name} to all, so "
            "longer texts give other numbers there."
        )
    rope = _rope(text, found, kind, head_dim, problems)
    if (text.get("rope_parameters") or {}).get("truncate") is False:
        notes.append("llama.cpp rounds where YaRN's blend of frequencies begins and ends, so positions differ a little there.")
    if architecture.computed is not None:
        found |= architecture.computed(text)
    problems.raise_if_any()
    return ModelLayout(kind, architecture, found, heads, kv_heads, rope, text, tuple(notes))


def _check_computed(text: Mapping[str, Any], architecture: Architecture, problems: Problems) -> None:
    """Adds to `problems` what llama.cpp computes in another way than the settings say."""
    for key in ("attention_bias", "mlp_bias"):
        if text.get(key) and architecture.name == "phi3":
            problems.add(f"{key} is on in config.json, which llama.cpp's phi3 does not support.")
    activation = text.get("hidden_activation") or text.get("hidden_act") or architecture.activation
    expected = ("silu", "swish") if architecture.activation == "silu" else (architecture.activation,)
    if activation not in expected:
        problems.add(f"The activation is '{activation}'; llama.cpp's {architecture.name} computes {expected[0]}.")
    for key, allowed in architecture.fixed:
        if key in text and text[key] not in allowed:
            problems.add(f"{key} is {text[key]}; llama.cpp's {architecture.name} computes it with {allowed[0]}.")
    every, types = architecture.every, list(text.get("layer_types") or [])
    wanted = ["full_attention" if every and (block + 1) % every == 0 else "sliding_attention" for block in range(len(types))]
    if every and types != wanted and _slides(text):
        problems.add(f"layer_types is {types[:6]}…; llama.cpp lets every {every}th block attend to all tokens, the others slide.")
    if architecture.rotates is not None:
        stated = [bool(value) for value in text.get("no_rope_layers") or architecture.rotates(text)]  # 1 where it rotates
        if stated != architecture.rotates(text):
            stated_in = text["no_rope_layers"]
            problems.add(f"no_rope_layers is {stated_in}; llama.cpp's {architecture.name} rotates all but every fourth.")


def _rotated(text: dict[str, Any]) -> float:
    """The share of each head that is rotated: transformers 5 writes it among the settings of the rotation, older files beside."""
    parameters = text.get("rope_parameters")
    own = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
    return float(own or text.get("partial_rotary_factor") or 1.0)


def _slides(text: Mapping[str, Any]) -> bool:
    """True if the window is in use and shorter than the context."""
    window, context = text.get("sliding_window"), text.get("max_position_embeddings")
    return bool(window) and text.get("use_sliding_window", True) is not False and int(window or 0) < int(context or 0)


def _check_gemma(text: Mapping[str, Any], kind: str, head_dim: int, problems: Problems) -> None:
    """Checks the scale of attention, which llama.cpp fixes for Gemma."""
    blocks = int(text["num_hidden_layers"])
    wide = (kind, blocks) in _WIDE_GEMMA
    theirs = text["hidden_size"] // text["num_attention_heads"] if wide else head_dim
    scalar = text.get("query_pre_attn_scalar", theirs)
    if not math.isclose(float(scalar), float(theirs)):
        problems.add(f"query_pre_attn_scalar is {scalar}; llama.cpp takes {theirs} for a model of {blocks} blocks.")


def _rope(text: Mapping[str, Any], found: dict[str, Value], kind: str, head_dim: int, problems: Problems) -> dict[str, Tensor]:
    """Adds rotary settings to `found`, and returns the factor tensors that llama.cpp reads beside the weights."""
    parameters = text.get("rope_parameters") or {}
    full = parameters.get("full_attention", parameters)
    local = parameters.get("sliding_attention", {})
    settings = {**(text.get("rope_scaling") or {}), **full}
    base = float(settings.get("rope_theta") or text.get("rope_theta") or 10000.0)
    found["rope.freq_base"] = base
    swa = local.get("rope_theta") or text.get("rope_local_base_freq")
    if swa and kind == "gemma3_text":
        found["rope.freq_base_swa"] = float(swa)
    rule = str(settings.get("rope_type") or settings.get("type") or "default")
    if rule == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(settings["factor"])}
    elif rule == "yarn":
        found |= _yarn(settings, kind, problems)
    elif rule == "dynamic" and kind == "hunyuan_v1_dense" and settings.get("alpha") and float(settings.get("factor") or 1) == 1:
        found["rope.freq_base"] = base * float(settings["alpha"]) ** (head_dim / (head_dim - 2))  # as the family's own code
    elif rule == "llama3":
        return {"rope_freqs.weight": _llama3_factors(settings, base, head_dim)}
    elif rule == "proportional" and kind.startswith("gemma4"):
        half, turned = wide_head(text) // 2, int(wide_head(text) * float(settings["partial_rotary_factor"]) / 2)
        return {"rope_freqs.weight": torch.tensor([1.0] * turned + [1e30] * (half - turned))}  # 1e30: not rotated
    elif rule in ("longrope", "su") and kind == "phi3":
        original = int(text.get("original_max_position_embeddings") or settings["original_max_position_embeddings"])
        ratio = int(text["max_position_embeddings"]) / original
        found["rope.scaling.original_context_length"] = original
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        return {f"rope_factors_{which}.weight": torch.tensor(settings[f"{which}_factor"]).float() for which in ("long", "short")}
    elif rule != "default":
        known = "default, linear, llama3, yarn, Phi-3's longrope, Gemma 4's proportional"
        problems.add(f"The rotary scaling '{rule}' is not known here; known: {known}.")
    return {}


def _yarn(settings: Mapping[str, Any], kind: str, problems: Problems) -> dict[str, Value]:
    """YaRN's settings. llama.cpp multiplies by 1 + 0.1·ln(factor) itself; its attention factor comes on top."""
    factor = float(settings["factor"])
    found: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(settings["original_max_position_embeddings"]),
        "rope.scaling.yarn_beta_fast": float(settings.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(settings.get("beta_slow") or 1.0),
    }
    if settings.get("attention_factor"):
        found["rope.scaling.attn_factor"] = float(settings["attention_factor"]) / (1 + 0.1 * math.log(factor))
    if kind != "ministral3" and (settings.get("mscale") or settings.get("mscale_all_dim")):
        problems.add("The rotary scaling has an mscale, which is written for Ministral 3 alone.")
    return found


def _llama3_factors(settings: Mapping[str, Any], base: float, head_dim: int) -> Tensor:
    """The divisor of each rotary frequency by Llama 3.1's rule, (head_dim / 2,): 1, the factor, or a blend."""
    factor = float(settings["factor"])
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    original = float(settings["original_max_position_embeddings"])
    wavelengths = 2 * math.pi * base ** (torch.arange(0, head_dim, 2).double() / head_dim)
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
