"""Model families as data: path of the blocks, names of their matrices, scaling of the logits, learning-rate exponent.

A new family is one line in `FAMILIES`. Other models are `GENERIC`, which reads names from the module tree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from packaging.version import Version

LLAMA_LIKE = 0.781  # exponent p of the learning-rate rule 5e-5·10·(2000/hidden)^p
QWEN_LIKE = 0.0775


@dataclass(frozen=True)
class LogitScaling:
    """logits·factor/divisor, then capped at `cap` where there is one."""

    factor: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    @property
    def none(self) -> bool:
        """True if logits stay as they are."""
        return self == LogitScaling()


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
    # Configuration keys for the logits; where the configuration has no such key, nothing is done.
    logit_factor: str = ""
    logit_divisor: str = "logits_scaling"
    soft_cap: str = "final_logit_softcapping"  # a cap c: logits become c·tanh(logits/c)

    def logits_of(self, config: Any) -> LogitScaling:
        """What a model with this configuration of its text part does to its logits."""
        factor = getattr(config, self.logit_factor, None) if self.logit_factor else None
        divisor, cap = (getattr(config, key, None) for key in (self.logit_divisor, self.soft_cap))
        return LogitScaling(1.0 if factor is None else factor, 1.0 if divisor is None else divisor, cap)


GENERIC = Family("generic", (), attention=(), mlp=(), blocks="")

FAMILIES: tuple[Family, ...] = (
    Family("llama", ("llama",)),
    Family("mistral", ("mistral", "ministral")),
    Family("mixtral", ("mixtral",), mlp=()),
    Family("qwen2", ("qwen2",), rate_exponent=QWEN_LIKE),
    Family("qwen3", ("qwen3",), rate_exponent=QWEN_LIKE),
    Family("qwen2_moe", ("qwen2_moe",), rate_exponent=QWEN_LIKE),
    Family("qwen3_moe", ("qwen3_moe",), rate_exponent=QWEN_LIKE),
    Family("gemma", ("gemma",)),
    Family("gemma2", ("gemma2",)),
    Family("gemma3", ("gemma3_text",)),
    Family("phi3", ("phi3",), ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj"), fused=("qkv_proj", "gate_up_proj")),
    Family("gpt2", ("gpt2",), ("attn.c_attn", "attn.c_proj"), ("c_fc", "mlp.c_proj"), ("attn.c_attn",), "transformer.h"),
    Family("cohere", ("cohere", "cohere2", "cohere2_moe"), logit_factor="logit_scale"),
    Family("granite", ("granite",)),
    Family("granitemoe", ("granitemoe", "granitemoeshared"), mlp=()),
    Family("recurrent_gemma", ("recurrent_gemma",), attention=(), mlp=(), blocks="", soft_cap="logits_soft_cap"),
    Family("falcon_h1", ("falcon_h1",), attention=(), mlp=(), logit_factor="lm_head_multiplier"),
)


# Linear layers whose weight other code reads without calling them, by model type: a pair would have no effect.
READ_DIRECTLY = {
    **dict.fromkeys(("gemma3n", "gemma3n_text"), ("correction_coefs",)),
    **dict.fromkeys(("jamba", "doge", "falcon_mamba", "mamba"), ("dt_proj",)),
}


# Wrappers whose own code multiplies by the head alone, without the factor that the code of their text part applies.
UNSCALED = {"cohere2_vision", *(("aya_vision",) if Version(version("transformers")) < Version("5.25") else ())}
# Modules that only choose which tokens are attended to: no gradient reaches them.
CHOOSING = ("indexer",)
# What configurations call the most tokens that a token attends to, where a model chooses them by scores; keys are multiplied.
CHOSEN_TOKENS = (("index_topk",), ("index_topk_blocks", "index_block_size"), ("indexer_budget",), ("keep_window_size",))
# What configurations call the most tokens of a text; the first that is there.
CONTEXT = ("max_position_embeddings", "max_seq_len")
# Models whose replies depend on padding on the left, also of few tokens: texts are continued one by one.
READS_PADDING = ("deepseek_v4", "git")
# Parts of wrappers that stand within the language model, by model type; others stand beside it.
OUTSIDE_TEXT = {"phi4_multimodal": ("embed_tokens_extend",), "git": ("image_encoder", "visual_projection")}


def family_of(config: Any) -> Family:
    """Returns the family of a transformers configuration or `model_type`, or `GENERIC`."""
    model_type = config if isinstance(config, str) else getattr(config, "model_type", "")
    return next((family for family in FAMILIES if model_type in family.model_types), GENERIC)


def family_of_model(config: Any) -> Family:
    """Returns the family of the text part of a whole model's transformers configuration."""
    found = family_of(config.get_text_config())
    return replace(found, logit_factor="") if getattr(config, "model_type", "") in UNSCALED else found


def in_group(path: str, names: Iterable[str], words: Iterable[str]) -> bool:
    """True if `path` ends in one of `names`, or without names, if a parent of it has one of `words` in its name."""
    names = tuple(names)
    if names:
        return any(path == name or path.endswith(f".{name}") for name in names)
    parents = path.lower().split(".")[:-1]
    return any(word in parent for parent in parents for word in words)
