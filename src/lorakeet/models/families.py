"""Model families as data: path of the blocks, names of their matrices, scaling of the logits, learning-rate exponent.

A new family is one line in `FAMILIES`. Other models are `GENERIC`, which reads names from the module tree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

LLAMA_LIKE = 0.781  # exponent p of the learning-rate rule 5e-5·10·(2000/hidden)^p
QWEN_LIKE = 0.0775


@dataclass(frozen=True)
class Family:
    """What Lorakeet needs to know of an architecture; the defaults are Llama's."""

    name: str
    model_types: tuple[str, ...]  # `model_type` of config.json
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    fused: tuple[str, ...] = ()  # those of the above that contain several matrices
    blocks: str = "model.layers"
    rate_exponent: float = LLAMA_LIKE
    soft_cap: str = ""  # configuration key of a cap c: logits become c·tanh(logits/c)
    logit_factor: str = ""  # configuration key of a factor on the logits
    logit_divisor: str = ""  # configuration key of a divisor of the logits


GENERIC = Family("generic", (), attention=(), mlp=(), blocks="")

# The UNet and the CLIP encoders of Stable Diffusion, and the transformers of SD3 and FLUX, in diffusers' and transformers' names.
DIFFUSION = Family(
    "diffusion",
    (),
    attention=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
               "q_proj", "k_proj", "v_proj", "out_proj"),
    mlp=("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "fc1", "fc2"),
    blocks="",
)  # fmt: skip

FAMILIES: tuple[Family, ...] = (
    Family("llama", ("llama",)),
    Family("mistral", ("mistral", "ministral")),
    Family("mixtral", ("mixtral",), mlp=()),
    Family("qwen2", ("qwen2",), rate_exponent=QWEN_LIKE),
    Family("qwen3", ("qwen3",), rate_exponent=QWEN_LIKE),
    Family("qwen2_moe", ("qwen2_moe",), rate_exponent=QWEN_LIKE),
    Family("qwen3_moe", ("qwen3_moe",), rate_exponent=QWEN_LIKE),
    Family("gemma", ("gemma",)),
    Family("gemma2", ("gemma2",), soft_cap="final_logit_softcapping"),
    Family("gemma3", ("gemma3_text",), soft_cap="final_logit_softcapping"),
    Family("phi3", ("phi3",), ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj"), fused=("qkv_proj", "gate_up_proj")),
    Family("gpt2", ("gpt2",), ("attn.c_attn", "attn.c_proj"), ("c_fc", "mlp.c_proj"), ("attn.c_attn",), "transformer.h"),
    Family("cohere", ("cohere", "cohere2"), logit_factor="logit_scale"),
    Family("granite", ("granite",), logit_divisor="logits_scaling"),
    Family("granitemoe", ("granitemoe", "granitemoeshared"), mlp=(), logit_divisor="logits_scaling"),
)


def family_of(config: Any) -> Family:
    """Returns the family of a transformers configuration or `model_type`, or `GENERIC`."""
    model_type = config if isinstance(config, str) else getattr(config, "model_type", "")
    return next((family for family in FAMILIES if model_type in family.model_types), GENERIC)


def in_group(path: str, names: Iterable[str], words: Iterable[str]) -> bool:
    """True if `path` ends in one of `names`, or without names, if a parent of it has one of `words` in its name."""
    names = tuple(names)
    if names:
        return any(path == name or path.endswith(f".{name}") for name in names)
    parents = path.lower().split(".")[:-1]
    return any(word in parent for parent in parents for word in words)
