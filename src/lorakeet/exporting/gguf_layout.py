"""Model families in llama.cpp: metadata keys from config.json, and the conversion of each stored tensor.

    model_type             architecture   rows of q and k      norm weights
    llama, mistral         llama          permuted (2.5)       as stored
    qwen2, qwen3           qwen2, qwen3   as stored            as stored
    gemma2, gemma3_text    gemma2/gemma3  as stored            w + 1, as llama.cpp multiplies by the stored number alone
    phi3                   phi3           fused qkv, gate_up   as stored

The permutation is that of `formats/gguf`: llama.cpp rotates neighbours where transformers rotates halves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import ConfigError, Problems, nearest
from lorakeet.formats.gguf import permute, permuted_heads

Value = int | float | bool | str


@dataclass(frozen=True)
class Architecture:
    """One row of the table above; `metadata` are pairs of (key without the architecture, key of config.json)."""

    name: str
    norm_plus_one: bool = False
    metadata: tuple[tuple[str, str], ...] = ()


_SLIDING = (("attention.sliding_window", "sliding_window"),)
_CAPS = (("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping", "final_logit_softcapping"))
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama"),
    "mistral": Architecture("llama"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2", norm_plus_one=True, metadata=(*_SLIDING, *_CAPS)),
    "gemma3_text": Architecture("gemma3", norm_plus_one=True, metadata=_SLIDING),
    "phi3": Architecture("phi3", metadata=_SLIDING),
}
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
    """A model's metadata in GGUF, and the conversion of its tensors; `notes` say what differs there."""

    model_type: str
    architecture: Architecture
    metadata: Mapping[str, Value]
    heads: int
    kv_heads: int
    rope: Mapping[str, Tensor]  # rope_freqs.weight and the like, made from config.json
    notes: tuple[str, ...] = ()

    def change_of(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """The conversion of the tensor that transformers calls `name`; None if it is written as stored."""
        module, _, leaf = name.rpartition(".")
        heads = permuted_heads(self.model_type, module, self.heads, self.kv_heads)
        if heads and leaf in ("weight", "bias"):
            return lambda tensor: permute(tensor, heads)
        if self.architecture.norm_plus_one and module.endswith("norm"):
            return lambda tensor: tensor + 1
        return None


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
    problems, notes = Problems(f"{folder} cannot be written as GGUF"), []
    missing = [theirs for _, theirs in SHARED if not isinstance(text.get(theirs), int)]
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
    if kind in ("gemma2", "gemma3_text"):
        _check_gemma(text, kind, head_dim, problems)
    if kind in ("mistral", "phi3", "qwen2", "qwen3") and _slides(text):
        notes.append(
            f"The model attends to the last {text['sliding_window']} tokens only, llama.cpp's {architecture.name} to all, so "
            "longer texts give other numbers there."
        )
    for key in ("attention_bias", "mlp_bias"):
        if text.get(key) and kind == "phi3":
            problems.add(f"{key} is on in config.json, which llama.cpp's phi3 does not support.")
    activation = text.get("hidden_activation") or text.get("hidden_act") or "silu"
    expected = ("gelu_pytorch_tanh",) if kind.startswith("gemma") else ("silu", "swish")
    if activation not in expected:
        problems.add(f"The activation is '{activation}'; llama.cpp's {architecture.name} computes {expected[0]}.")
    rope = _rope(text, found, kind, head_dim, problems)
    problems.raise_if_any()
    return ModelLayout(kind, architecture, found, heads, kv_heads, rope, tuple(notes))


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
    """Checks what llama.cpp fixes for Gemma: the scale of attention, and which blocks have a sliding window."""
    blocks = int(text["num_hidden_layers"])
    wide = (kind, blocks) in _WIDE_GEMMA
    theirs = text["hidden_size"] // text["num_attention_heads"] if wide else head_dim
    scalar = text.get("query_pre_attn_scalar", theirs)
    if not math.isclose(float(scalar), float(theirs)):
        problems.add(f"query_pre_attn_scalar is {scalar}; llama.cpp takes {theirs} for a model of {blocks} blocks.")
    every = 2 if kind == "gemma2" else 6
    types = text.get("layer_types") or []
    wanted = ["full_attention" if (block + 1) % every == 0 else "sliding_attention" for block in range(blocks)]
    if types and types != wanted and _slides(text):
        problems.add(f"layer_types is {types[:6]}…; llama.cpp lets every {every}th block attend to all tokens, the others slide.")


def _rope(text: Mapping[str, Any], found: dict[str, Value], kind: str, head_dim: int, problems: Problems) -> dict[str, Tensor]:
    """Adds rotary settings to `found`, and returns the factor tensors that llama.cpp reads beside the weights."""
    parameters = text.get("rope_parameters") or {}
    full = parameters.get("full_attention", parameters)
    local = parameters.get("sliding_attention", {})
    settings = {**(text.get("rope_scaling") or {}), **full}
    found["rope.freq_base"] = float(settings.get("rope_theta") or text.get("rope_theta") or 10000.0)
    swa = local.get("rope_theta") or text.get("rope_local_base_freq")
    if swa and kind == "gemma3_text":
        found["rope.freq_base_swa"] = float(swa)
    rule = str(settings.get("rope_type") or settings.get("type") or "default")
    if rule == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(settings["factor"])}
    elif rule == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(settings["factor"]),
            "rope.scaling.original_context_length": int(settings["original_max_position_embeddings"]),
        }
    elif rule == "llama3":
        return {"rope_freqs.weight": _llama3_factors(settings, float(found["rope.freq_base"]), head_dim)}
    elif rule in ("longrope", "su") and kind == "phi3":
        original = int(text.get("original_max_position_embeddings") or settings["original_max_position_embeddings"])
        ratio = int(text["max_position_embeddings"]) / original
        found["rope.scaling.original_context_length"] = original
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        return {f"rope_factors_{which}.weight": torch.tensor(settings[f"{which}_factor"]).float() for which in ("long", "short")}
    elif rule != "default":
        problems.add(f"The rotary scaling '{rule}' is not known here; known: default, linear, llama3, yarn, Phi-3's longrope.")
    return {}


def _llama3_factors(settings: Mapping[str, Any], base: float, head_dim: int) -> Tensor:
    """The divisor of each rotary frequency by Llama 3.1's rule, (head_dim / 2,): 1, the factor, or a blend."""
    factor = float(settings["factor"])
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    original = float(settings["original_max_position_embeddings"])
    wavelengths = 2 * math.pi * base ** (torch.arange(0, head_dim, 2).double() / head_dim)
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
