"""Which modules PEFT takes for experts by their names, how an adapter names them so that it does not, and what PEFT refuses.

Transformers 5 stacks the experts of many mixtures in two parameters. For these model types PEFT (0.19 and later) renames every
target that ends in one of the old experts' names, also of dense layers and shared experts: their pairs vanish, or do not fit.
A target parameter is not renamed, and the parameter `weight` of a linear layer takes the same pair, in tensors of the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakeet.core.adapter import MODEL_TYPE, Adapter, Pair

WEIGHT = "weight"  # the parameter of a linear layer

# The names that PEFT renames, and the model types for which it does (transformers.conversion_mapping of 5.24).
_OLD_NAMES = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
_TYPES = {
    "mixtral": ("minimax", "minimax_m2"),
    "qwen2_moe": (
        "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
        "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
        "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "sarvam_mla",
        "solar_open",
    ),
}  # fmt: skip
# Mamba's kernels read these weights without calling their modules, so a pair would have no effect; PEFT refuses them.
_READ_DIRECTLY = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
# As PEFT reads a file, it renames modules as transformers does, and here it renames what has the new name already.
_DROPPED = {"laguna": ("shared_experts",), "mistral_large4": ("experts", "shared_experts")}
RENAMED = {kind: _OLD_NAMES[like] for like, kinds in _TYPES.items() for kind in kinds}


def model_type_to_keep(model_type: str) -> dict[str, str]:
    """The metadata of an adapter for this type of base: the type, if PEFT renames targets of such models; else nothing."""
    return {MODEL_TYPE: model_type} if model_type in RENAMED else {}


def model_type_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of an adapter for a base with this config.json: as `model_type_to_keep`; of its text model if that has it."""
    text = config.get("text_config")
    types = [config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None]
    return next((found for kind in types if (found := model_type_to_keep(str(kind)))), {})


def needs_parameter(model_type: str, path: str) -> bool:
    """True if PEFT reads a pair of the linear layer at `path` of such a model only as one on its weight: with no DoRA or bias."""
    return path.rpartition(".")[2] in RENAMED.get(model_type, ())


def refused_by_peft(model_type: str, path: str) -> bool:
    """True if PEFT refuses a pair on the module at `path` of such a model, or drops it as it reads the file."""
    if set(path.split(".")) & set(_DROPPED.get(model_type, ())):
        return True
    return model_type in _READ_DIRECTLY and path.rpartition(".")[2] in ("out_proj", "conv1d")


def as_parameter(adapter: Adapter, path: str) -> bool:
    """True if the pair at `path` must be written as one on the parameter `weight`, for PEFT to read it."""
    return needs_parameter(adapter.metadata.get(MODEL_TYPE, ""), path) and _fits_parameter(adapter.pairs[path])


def _fits_parameter(pair: Pair) -> bool:
    """True for what PEFT can put on a parameter."""
    return pair.kind == "linear" and pair.magnitude is None and pair.bias is None
