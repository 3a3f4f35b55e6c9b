"""Tiny models of many architectures without weights, for what reads names and shapes alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_SHARED: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip
OUTLINES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SHARED),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_SHARED, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_SHARED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "linear_num_value_heads": 4,
         "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16},
    ),
    "mamba2": (
        "Mamba2Config",
        {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 16,
         "n_groups": 1},
    ),
    "falcon_h1": (
        "FalconH1Config",
        {**_SHARED, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    ),
    "jamba": (
        "JambaConfig",
        {**_SHARED, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    ),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        {**_SHARED, "num_local_experts": 4, "shared_intermediate_size": 32, "mamba_n_heads": 8, "mamba_d_state": 16,
         "mamba_d_head": 16, "layer_types": ["mamba", "attention", "mamba", "attention"]},
    ),
    "nemotron_h": ("NemotronHConfig", {**_SHARED, "n_routed_experts": 4}),
    "lfm2": ("Lfm2Config", {**_SHARED, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "dbrx": (
        "DbrxConfig",
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 96,
         "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
         "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}},
    ),
    "gpt_oss": ("GptOssConfig", {**_SHARED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "jetmoe": ("JetMoeConfig", {**_SHARED, "num_local_experts": 4}),
    "recurrent_gemma": ("RecurrentGemmaConfig", {**_SHARED, "lru_width": 64}),
    "gemma3": ("Gemma3Config", {"text_config": _SHARED, "vision_config": _VISION, "mm_tokens_per_image": 4}),
}  # fmt: skip


def outline(name: str) -> Any:
    """The model `name` of `OUTLINES` on the meta device."""
    config_class, arguments = OUTLINES[name]
    config = getattr(transformers, config_class)(**arguments)
    auto = transformers.AutoModelForImageTextToText if hasattr(config, "vision_config") else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)
