"""Small configurations of any model type that transformers has: hidden 64, every kind of layer, windows shorter than a row.

Sizes that all families name alike follow `RULES`; what a family needs beside them is one line in `CHANGES`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

VOCABULARY, MOST_LAYERS = 320, 6
IDS = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}  # of tiny_tokenizer
_RULES = (
    (r"hidden_size|d_model|n_embd|model_dim|embed_dim|width|lru_width|embedding_size|projection_dim|output_dim", 64),
    (r"(.*_)?intermediate_size(_mlp)?|d_ff|n_inner|(.*_)?ffn_(hidden_)?(dim|size)|feed_forward_size|mlp_dim", 96),
    (r"(.*_)?(moe|expert|shared)_intermediate_size|expert_ffn_hidden_size|moe_ffn_hidden_size", 32),
    (r"(num_|n_)?((de|en)coder_|hidden_|transformer_)?(layers?|blocks|depth)|depth|num_layers_per_stack", 4),
    (r"((num|n)_)?((swa_|de|en)(coder_)?)?(num_)?(attention_|query_)?heads?|n_head|num_heads", 4),
    (r"(swa_)?(num_|n_)?(global_)?(key_value|kv)_heads", 2),
    (r"((swa_|global_|attention_|index_|v_|swa_v_|linear_key_|linear_value_))?head_dim|query_pre_attn_scalar|kv_channels", 16),
    (r"attention_head_size|d_kv", 16),
    (r"(text_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"(moe_)?(num|n)_(local_|routed_|moe_)?experts|moe_num_routed_experts", 4),
    (r"num_experts_per_tok(en)?|moe_(k|topk|top_k)|num_selected_experts|top_k_experts", 2),
    (r"n_group|topk_groups?|num_expert_group|n_groups", 1),
    (r"(kv|q|o)_lora_rank", 16),
    (r"qk_(rope|nope)_head_dim|rotary_dim", 8),
    (r"sliding_window(_size)?|attention_(chunk|window)_size|local_(window|attention)|window_size_right|window", 8),
    (r"((mamba|ssm|mamba2)_)?(d_state|state_size)|time_step_rank", 8),
    (r"mamba_(n_heads|num_heads)|linear_num_(key_|value_)?heads|index_n_heads|n_mamba_heads", 4),
    (r"mamba_(d_head|head_dim|headdim)", 32),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"hidden_size_per_layer_input|laurel_rank", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|seq_length|max_(target|source)_positions", 256),
    (r"(mamba_)?chunk_size", 16),
    (r"image_size", 32),
    (r"patch_size", 8),
)  # fmt: skip
RULES = tuple((re.compile(pattern), value) for pattern, value in _RULES)
MULTIPLE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}  # of a head of 16
COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"sliding_attention": MULTIPLE, "full_attention": None},
}
SHARED = {
    "num_hidden_layers": 10, "num_kv_shared_layers": 5, "activation_sparsity_pattern": [0.95] * 5 + [0.0] * 5,
    "intermediate_size": [96] * 10,  # of 16,384, one lies on its threshold to rounding: its gradient is 0 or 1
}
SPARSE = {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_block_size": 4, "index_topk_blocks": 2}
INDEXED = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4,
    "linear_num_value_heads": 8,
}  # fmt: skip
POOLS = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "indexed_attention"] * 2, "index_topk": 8,
    "index_pool_size": 16, "index_compression": 4, "index_num_heads": 1, "index_num_local_tokens": 4,
    "index_num_sink_tokens": 2, "mlp_only_intermediate_size": 96,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}  # as released
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 32, "hidden_size": 64},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},  # of rows of 23
    **{kind: {"index_topk": 8} for kind in ("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4")},  # of rows of 23
    "glm5_next": {"text_config": {"index_topk": 8, "index_kpool": 4}},
    "mistral_large4": {"text_config": {"index_topk": 8}},
    "doge": {"keep_window_size": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4, "index_topk": 8},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 1, "lm_head_multiplier": 0.5},
    "gemma3n": {"text_config": SHARED},
    "gemma3n_text": SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granite": {"logits_scaling": 4.0},
    "granitemoehybrid": {
        "layer_types": ["mamba", "mamba", "attention", "mamba"], "mamba_n_heads": 4, "mamba_d_head": 32, "logits_scaling": 4.0,
        "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "gemma4": {"vision_config": {"use_clipped_linears": True}},  # as released
    "gemma4_text": {"final_logit_softcapping": 30.0},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},  # the first becomes the passes through all stacks
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "kolibri1_1": POOLS,
    "laguna": {**SLIDING, "num_attention_heads_per_layer": [8, 4] * 2},
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    "lfm2_vl": {"text_config": CONVOLUTIONS},
    "llava_onevision1_5": {"vision_config": {"out_hidden_size": 64}},
    "longcat_flash": {"zero_expert_num": 2},  # of 256, few tokens would choose an expert with weights
    "mamba2": {"num_heads": 4, "head_dim": 32, "expand": 2},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2},
        "audio_config": {"projection_hidden_size": 64, "projection_bias": False},
    },
    "nemotron_h": {
        "moe_latent_size": None, "layers_block_type": ["mamba", "moe", "attention", "moe"], "mamba_num_heads": 4,
        "mamba_head_dim": 32, "n_routed_experts": 4,
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    **{
        kind: {"text_config": {"rope_parameters": MULTIPLE}}
        for kind in ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "glmga")
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {**MULTIPLE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}},
    "mellum": SLIDING,
    "minimax_m3_vl": {"text_config": SPARSE},
    "minimax_m3_vl_text": SPARSE,
    "mistral4": {"head_dim": 16},
    **{kind: {"linear_num_value_heads": 8} for kind in ("qwen3_5_text", "qwen3_5_moe_text")},
    "qwen3_next": {"linear_num_value_heads": 8, "norm_topk_prob": True},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    **{kind: {"text_config": {"linear_num_value_heads": 8}} for kind in ("qwen3_5", "qwen3_5_moe")},
    "reformer": {"is_decoder": True},
    "step3p7": {"text_config": {**SLIDING, "sliding_window": 8, "num_sliding_attention_heads": 8}},
}  # fmt: skip


SWITCH = 16  # tokens from which on longrope changes its frequencies: some rows of family_columns are longer, others not


def _longrope(factors: int, **more: float) -> dict[str, Any]:
    """The rotary settings of models whose frequencies depend on the length of a text."""
    short, long = [1.0 + 0.1 * place for place in range(factors)], [4.0 + place for place in range(factors)]
    share = {} if more else {"partial_rotary_factor": 0.75}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long}
    return {
        "rope_parameters": {**rope, "original_max_position_embeddings": SWITCH, **share, **more},
        "original_max_position_embeddings": SWITCH,
    }


# Kinds of models of one type that differ by their configuration: the type, and what is changed beside.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text (experts)": (
        "gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "qwen2_moe (windows)": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "phi3 (longrope)": ("phi3", _longrope(6)),
    "phimoe (longrope)": ("phimoe", _longrope(8, short_mscale=1.1, long_mscale=1.4)),
    "phi4_multimodal (longrope)": ("phi4_multimodal", _longrope(6)),
    "minicpm3 (longrope)": ("minicpm3", _longrope(4, partial_rotary_factor=1.0)),
    "llama (dynamic)": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "hunyuan_v1_dense (dynamic)": (
        "hunyuan_v1_dense", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0}},
    ),
    "llama (yarn)": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": SWITCH,
            },
        },
    ),
    "falcon (alibi)": ("falcon", {"alibi": True}),
    "ministral3 (temperatures)": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": SWITCH,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
}  # fmt: skip


def type_of(kind: str) -> str:
    """The model type of a kind, which is one or a variant of one."""
    return VARIANTS[kind][0] if kind in VARIANTS else kind


def small_config(kind: str) -> Any:
    """The configuration of a small model of this type or variant, as transformers makes it."""
    owner = CONFIG_MAPPING[type_of(kind)]
    more = VARIANTS[kind][1] if kind in VARIANTS else {}
    usual, changes = owner(), copy.deepcopy({**CHANGES.get(type_of(kind), {}), **more})
    found = _small(usual)
    for name, part_owner in (owner.sub_configs or {}).items():
        part = getattr(usual, name, None)
        if part is None:  # released with this part, but none by default
            part = _default_part(owner, name, part_owner)
        if part is not None:
            found[name] = {**_small(part), **changes.pop(name, {}), "model_type": part.model_type}
    return owner(**{**found, **changes})


def _default_part(owner: Any, name: str, part_owner: type) -> Any:
    """The usual configuration of a part: of its own class, or of the type that its owner names; else None."""
    if issubclass(part_owner, transformers.PretrainedConfig):
        return part_owner()
    told = getattr(owner, "sub_configs_defaults", {}).get(name)
    return CONFIG_MAPPING[told.model_type]() if told is not None and told.model_type else None


def parts_of(config: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    """The parts of a configuration by path, those of parts too: as many as its class has, None where one is missing."""
    for name in type(config).sub_configs or {}:
        yield f"{within}{name}", (part := getattr(config, name, None))
        if isinstance(part, transformers.PretrainedConfig):
            yield from parts_of(part, f"{within}{name}.")


def _small(usual: Any) -> dict[str, Any]:
    """The sizes of one configuration, with its tokens' ids, and as many layers as show each kind of them."""
    found = {key: small for key, value in vars(usual).items() if (small := _size(key, value)) is not None}
    if "qk_rope_head_dim" in found:  # latent attention: no groups, and the width of a head is that of its rotation
        found |= {key: value for key, value in {"head_dim": 8, "num_key_value_heads": 4}.items() if key in found}
    layers = next((key for key in ("num_hidden_layers", "n_layers", "num_layers") if key in found), "")
    kinds = getattr(usual, "layer_types", None)
    if layers and isinstance(kinds, (list, tuple)) and all(isinstance(kind, str) for kind in kinds):
        each = list(dict.fromkeys(kinds))
        enough = max((kinds.index(kind) + 1 for kind in each), default=0)
        if enough > MOST_LAYERS:
            found["layer_types"] = [*kinds[: found[layers] - len(each)], *each][-found[layers] :]
        else:
            found[layers] = max(found[layers], enough)
    return found | {key: value for key, value in IDS.items() if hasattr(usual, key)}


def _size(key: str, value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    small = next((small for pattern, small in RULES if pattern.fullmatch(key)), None)
    return small if small is None or "vocab" in key else min(value, small)
