"""What llama.cpp computes of each model family: one `Architecture` for each model type of transformers.

    llama, mistral, mixtral, ministral, ministral3, smollm3,     rows of q and k are permuted (`formats/gguf`: llama.cpp
    granite, granitemoe, granitemoeshared, granitemoehybrid      rotates neighbours where transformers rotates halves)
    gemma, gemma2, gemma3_text, qwen3_next, qwen3_5…             norm weights w + 1: llama.cpp multiplies by the stored number
    mixtral, qwen2_moe, qwen3_moe, lfm2_moe                      the matrices of experts are stacked
    gpt_oss, granitemoe…, qwen3_5_moe…                           their gates and ups are stored apart

A tensor keeps its numbers and gets the name that gguf's own map has for it, unless a `Rule` says otherwise. The facts are those
of llama.cpp's loaders and converters, build 11739; the tests compare logits with llama.cpp for each family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lorakeet.errors import ConfigError
from lorakeet.exporting import gguf_conversions as to
from lorakeet.exporting.gguf_conversions import Config, Conversion

Value = int | float | bool | str | list[int] | list[bool]
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Target:
    """A tensor of the GGUF file: its name, {n} the block; "" for the name of gguf's own map; and how it is computed."""

    name: str
    convert: Conversion | None = None


@dataclass(frozen=True)
class Rule:
    """Tensors of this name in the folder, {n} the block and {e} the expert, become `targets`. Experts are stacked."""

    name: str
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp computes of a family. `metadata` are pairs of (key without the architecture, key of config.json)."""

    name: str
    metadata: Pairs = ()
    constants: tuple[tuple[str, Value], ...] = ()
    norm_plus_one: bool = False  # llama.cpp multiplies by the stored number, transformers by 1 + w
    plain_norms: tuple[str, ...] = ()  # ends of the names of those that are stored as they are
    activation: str = "silu"
    rules: tuple[Rule, ...] = ()
    fixed: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # settings that llama.cpp computes in one way only
    computed: Callable[[Config], dict[str, Value]] | None = None
    variant: Callable[[Config], Architecture] | None = None  # the architecture of a model of this family, where there are several
    every: int = 0  # each so many blocks attend to all tokens, the others to a window; llama.cpp has the number itself
    windows: bool = False  # llama.cpp attends to the last `sliding_window` tokens only
    rotates: Callable[[Config], list[bool]] | None = None  # which blocks rotate positions, where llama.cpp has that itself


_GELU = "gelu_pytorch_tanh"
_SLIDING: Pairs = (("attention.sliding_window", "sliding_window"),)
_CAPS: Pairs = (("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping", "final_logit_softcapping"))
_SCALES: Pairs = (
    ("attention.scale", "attention_multiplier"), ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"), ("logit_scale", "logits_scaling"),
)  # fmt: skip
_CHOSEN: Pairs = (("expert_used_count", "num_experts_per_tok"),)
_LOCAL: Pairs = (("expert_count", "num_local_experts"), *_CHOSEN)
_NUMBER: Pairs = (*_LOCAL, ("expert_count", "num_experts"), ("expert_feed_forward_length", "moe_intermediate_size"))
_SHARED: Pairs = (("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),)
_DELTA: Pairs = (
    ("ssm.conv_kernel", "linear_conv_kernel_dim"), ("ssm.state_size", "linear_key_head_dim"),
    ("ssm.group_count", "linear_num_key_heads"), ("ssm.time_step_rank", "linear_num_value_heads"),
)  # fmt: skip
_SCORED = (("norm_topk_prob", (True,)),)


def _experts(path: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Rule, ...]:
    """Experts whose matrices are tensors of their own, under `path`."""
    names = ((gate, "ffn_gate_exps"), (up, "ffn_up_exps"), (down, "ffn_down_exps"))
    return tuple(Rule(f"{path}.{{e}}.{theirs}.weight", (Target(f"blk.{{n}}.{ours}.weight"),)) for theirs, ours in names)


def _fused(name: str, ours: str) -> Rule:
    """Gate and up in one tensor, the rows of the gate first; a stack of such matrices too."""
    parts = (("gate", to.first_half), ("up", to.second_half))
    return Rule(name, tuple(Target(f"blk.{{n}}.ffn_{part}{ours}.weight", half) for part, half in parts))


_BLOCK = "model.layers.{n}."
_STACKED = (
    _fused(f"{_BLOCK}mlp.experts.gate_up_proj", "_exps"),
    Rule(f"{_BLOCK}mlp.experts.down_proj", (Target("blk.{n}.ffn_down_exps.weight"),)),
    *_experts(f"{_BLOCK}mlp.experts"),
)
_GPT_OSS = (
    Rule(f"{_BLOCK}self_attn.sinks", (Target("blk.{n}.attn_sinks.weight"),)),
    Rule(f"{_BLOCK}mlp.experts.gate_up_proj", (
        Target("blk.{n}.ffn_gate_exps.weight", to.even_columns), Target("blk.{n}.ffn_up_exps.weight", to.odd_columns),
    )),
    Rule(f"{_BLOCK}mlp.experts.gate_up_proj_bias", (
        Target("blk.{n}.ffn_gate_exps.bias", to.even_numbers), Target("blk.{n}.ffn_up_exps.bias", to.odd_numbers),
    )),
    Rule(f"{_BLOCK}mlp.experts.down_proj", (Target("blk.{n}.ffn_down_exps.weight", to.across),)),
    Rule(f"{_BLOCK}mlp.experts.down_proj_bias", (Target("blk.{n}.ffn_down_exps.bias"),)),
)  # fmt: skip
_GRANITE = (
    _fused(f"{_BLOCK}block_sparse_moe.input_linear.weight", "_exps"),
    _fused(f"{_BLOCK}shared_mlp.input_linear.weight", "_shexp"),
)
_MAMBA = (
    Rule(f"{_BLOCK}mamba.A_log", (Target("blk.{n}.ssm_a", to.decay_column),)),
    Rule(f"{_BLOCK}mamba.D", (Target("blk.{n}.ssm_d", to.a_column),)),
    Rule(f"{_BLOCK}mamba.dt_bias", (Target("blk.{n}.ssm_dt.bias"),)),
    Rule(f"{_BLOCK}mamba.conv1d.weight", (Target("", to.without_middle),)),
    Rule(f"{_BLOCK}mamba.norm.weight", (Target("", to.by_groups),)),
)
_CONVOLUTION = (Rule(f"{_BLOCK}conv.conv.weight", (Target("", to.without_middle),)),)
_LINEAR = f"{_BLOCK}linear_attn."
_DELTA_NET = (
    Rule(f"{_LINEAR}A_log", (Target("blk.{n}.ssm_a", to.v_decay),)),
    Rule(f"{_LINEAR}dt_bias", (Target("blk.{n}.ssm_dt.bias", to.one_v_row),)),
    Rule(f"{_LINEAR}conv1d.weight", (Target("", to.convolution_rows),)),
    Rule(f"{_LINEAR}in_proj_qkv.weight", (Target("", to.last_rows),)),
    Rule(f"{_LINEAR}in_proj_z.weight", (Target("", to.v_rows),)),
    Rule(f"{_LINEAR}in_proj_a.weight", (Target("", to.one_v_row),)),
    Rule(f"{_LINEAR}in_proj_b.weight", (Target("", to.one_v_row),)),
    Rule(f"{_LINEAR}out_proj.weight", (Target("", to.v_columns),)),
)
_QWEN3_NEXT = (
    Rule(f"{_LINEAR}A_log", (Target("blk.{n}.ssm_a", to.decay),)),
    Rule(f"{_LINEAR}dt_bias", (Target("blk.{n}.ssm_dt.bias"),)),
    Rule(f"{_LINEAR}conv1d.weight", (Target("", to.without_middle),)),
    Rule(f"{_LINEAR}in_proj_qkvz.weight", (
        Target("blk.{n}.attn_qkv.weight", to.qkv_of_qkvz), Target("blk.{n}.attn_gate.weight", to.z_of_qkvz),
    )),
    *_STACKED,
)  # fmt: skip
_GEMMA4 = (
    Rule(f"{_BLOCK}layer_scalar", (Target("blk.{n}.layer_output_scale.weight"),)),
    Rule(f"{_BLOCK}router.scale", (Target("blk.{n}.ffn_gate_inp.scale"),)),
    Rule(f"{_BLOCK}router.per_expert_scale", (Target("blk.{n}.ffn_down_exps.scale"),)),
    Rule(f"{_BLOCK}experts.gate_up_proj", (Target("blk.{n}.ffn_gate_up_exps.weight"),)),
    Rule(f"{_BLOCK}experts.down_proj", (Target("blk.{n}.ffn_down_exps.weight"),)),
)


def _delta_net(config: Config) -> dict[str, Value]:
    settings = config.get("rope_parameters") or {}
    sections = settings.get("mrope_section")
    found: dict[str, Value] = {
        "ssm.inner_size": int(config["linear_value_head_dim"]) * int(config["linear_num_value_heads"]),
        "full_attention_interval": _interval(config),
    }
    # Three positions, of time, height and width, which are alike in a text; llama.cpp reads how a head is split among them.
    half = int(int(config["head_dim"]) * float(settings.get("partial_rotary_factor", 0.25))) // 2
    return found | {"rope.dimension_sections": [*(sections or [(half + 2 - axis) // 3 for axis in range(3)]), 0]}


def _interval(config: Config) -> int:
    """Each so many blocks attend; 0 if they do not come at an interval."""
    kinds = list(config.get("layer_types") or [])
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    wanted = ["full_attention" if every and (block + 1) % every == 0 else "linear_attention" for block in range(len(kinds))]
    return every if kinds == wanted else 0


def _key_value_heads(config: Config) -> list[int]:
    """The number of key and value heads of each block, 0 where it does not attend."""
    heads = int(config["num_key_value_heads"])
    return [heads if kind in ("attention", "full_attention") else 0 for kind in config["layer_types"]]


def _convolutions(config: Config) -> dict[str, Value]:
    if "conv" not in config["layer_types"]:
        raise ConfigError("layer_types names no convolution; llama.cpp ends at once on a model of this family without one.")
    width = int(config["intermediate_size"])
    if config.get("block_auto_adjust_ff_dim"):  # as the family's own code: two thirds, in multiples
        multiple = int(config["block_multiple_of"])
        width = int(float(config.get("block_ffn_dim_multiplier") or 1.0) * int(2 * width / 3))
        width = multiple * -(-width // multiple)
    return {
        "attention.head_count_kv": _key_value_heads(config),
        "attention.layer_norm_rms_epsilon": float(config["norm_eps"]),
        "feed_forward_length": width,
    }


def _expert_convolutions(config: Config) -> dict[str, Value]:
    plain = {**config, "block_auto_adjust_ff_dim": False}
    return {**_convolutions(plain), "leading_dense_block_count": int(config["num_dense_layers"]), "expert_gating_func": 2}


def _mamba(config: Config) -> dict[str, Value]:
    found: dict[str, Value] = {
        "ssm.inner_size": int(config["mamba_n_heads"]) * int(config["mamba_d_head"]),
        "rope.scaling.finetuned": config.get("position_embedding_type") == "rope",
        "attention.head_count_kv": _key_value_heads(config),
    }
    return found


def _yarn(config: Config) -> dict[str, Value]:
    """Ministral 3 scales its queries with the position."""
    settings = config.get("rope_parameters") or {}
    found: dict[str, Value] = {}
    if "llama_4_scaling_beta" in settings:
        found["attention.temperature_scale"] = float(settings["llama_4_scaling_beta"])
    if "mscale_all_dim" in settings:
        found["rope.scaling.yarn_log_multiplier"] = float(settings["mscale_all_dim"])
    return found


def _of_full_blocks(config: Config, key: str) -> int:
    """A setting of the blocks that attend to all tokens, which transformers 5.24 writes block by block; 0 if they have none."""
    return max((int(own[key]) for own in (config.get("per_layer_config") or {}).values() if key in own), default=0)


def wide_head(config: Config) -> int:
    """The width of a head of Gemma 4 that attends to all tokens."""
    return int(config.get("global_head_dim") or _of_full_blocks(config, "head_dim") or config["head_dim"])


def _gemma4(config: Config) -> dict[str, Value]:
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    wide, narrow = wide_head(config), int(config["head_dim"])
    shared, width = int(config.get("num_kv_shared_layers") or 0), int(config["intermediate_size"])
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {})
    found: dict[str, Value] = {
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": int(config.get("hidden_size_per_layer_input") or 0),
        "attention.sliding_window_pattern": slides,
        "attention.key_length": wide, "attention.value_length": wide,
        "attention.key_length_swa": narrow, "attention.value_length_swa": narrow,
        "rope.dimension_count": wide, "rope.dimension_count_swa": narrow,
        "rope.freq_base_swa": float(local.get("rope_theta") or 10000.0),
    }  # fmt: skip
    if config.get("use_double_wide_mlp"):
        blocks = len(slides)
        found["feed_forward_length"] = [width if block < blocks - shared else 2 * width for block in range(blocks)]
    everywhere = config.get("num_global_key_value_heads") or _of_full_blocks(config, "num_key_value_heads")
    if everywhere:
        found["attention.head_count_kv"] = [int(config["num_key_value_heads"]) if near else int(everywhere) for near in slides]
    if config.get("enable_moe_block"):
        found |= {
            "expert_count": int(config["num_experts"]), "expert_used_count": int(config["top_k_experts"]),
            "expert_feed_forward_length": int(config["moe_intermediate_size"]),
        }  # fmt: skip
    return found


def _rotated_but_every_fourth(config: Config) -> list[bool]:
    return [(block + 1) % 4 != 0 for block in range(int(config["num_hidden_layers"]))]


_QWEN3_5 = Architecture(
    "qwen35", _DELTA, norm_plus_one=True, plain_norms=("linear_attn.norm",), rules=_DELTA_NET, computed=_delta_net,
)  # fmt: skip
_QWEN3_5_MOE = Architecture(
    "qwen35moe", (*_DELTA, *_NUMBER, *_SHARED), norm_plus_one=True, plain_norms=("linear_attn.norm",),
    rules=(*_DELTA_NET, *_STACKED), computed=_delta_net,
)  # fmt: skip
_GRANITE_MOE = Architecture(
    "granitemoe", (*_LOCAL, *_SCALES, ("expert_shared_feed_forward_length", "shared_intermediate_size")), rules=_GRANITE,
)  # fmt: skip
_GEMMA4_TEXT = Architecture(
    "gemma4", (*_SLIDING, *_CAPS), activation=_GELU, rules=_GEMMA4, computed=_gemma4, windows=True,
)  # fmt: skip
_GRANITE_HYBRID = Architecture(
    "granitehybrid", (
        *_GRANITE_MOE.metadata, ("ssm.conv_kernel", "mamba_d_conv"), ("ssm.state_size", "mamba_d_state"),
        ("ssm.group_count", "mamba_n_groups"), ("ssm.time_step_rank", "mamba_n_heads"),
    ),
    rules=(*_GRANITE, *_MAMBA), computed=_mamba,
)  # fmt: skip
_DENSE_GRANITE = (  # the expert that all share is the only one
    _fused(f"{_BLOCK}shared_mlp.input_linear.weight", ""),
    Rule(f"{_BLOCK}shared_mlp.output_linear.weight", (Target("blk.{n}.ffn_down.weight"),)),
)


def _granite4(config: Config) -> Architecture:
    """Granite 4 with or without experts, and with or without Mamba blocks."""
    experts = bool(config.get("num_local_experts"))
    if not set(config["layer_types"]) & {"mamba", "linear_attention"}:
        whole = _GRANITE_MOE if experts else Architecture("granite", _SCALES, rules=_DENSE_GRANITE)
    else:
        whole = _GRANITE_HYBRID if experts else replace(_GRANITE_HYBRID, rules=(*_DENSE_GRANITE, *_MAMBA))
    if experts:
        return whole
    sizes = tuple(pair for pair in whole.metadata if not pair[0].startswith("expert_"))
    return replace(whole, metadata=(*sizes, ("feed_forward_length", "shared_intermediate_size")))


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama"),
    "mistral": Architecture("llama"),
    "mixtral": Architecture("llama", _LOCAL, rules=_experts(f"{_BLOCK}block_sparse_moe.experts", "w1", "w3", "w2")),
    "ministral3": Architecture("mistral3", computed=_yarn),
    "smollm3": Architecture("smollm3", rotates=_rotated_but_every_fourth),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2_moe": Architecture("qwen2moe", (*_NUMBER, *_SHARED), rules=_STACKED, fixed=(("norm_topk_prob", (False,)),)),
    "qwen3_moe": Architecture("qwen3moe", _NUMBER, rules=_STACKED, fixed=_SCORED),
    "qwen3_next": Architecture(
        "qwen3next", (*_DELTA, *_NUMBER, *_SHARED), norm_plus_one=True, plain_norms=("linear_attn.norm",), rules=_QWEN3_NEXT,
        fixed=_SCORED, computed=_delta_net,
    ),
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5_MOE,
    "gemma": Architecture("gemma", norm_plus_one=True, activation=_GELU),
    "gemma2": Architecture("gemma2", (*_SLIDING, *_CAPS), norm_plus_one=True, activation=_GELU, every=2, windows=True),
    "gemma3_text": Architecture("gemma3", _SLIDING, norm_plus_one=True, activation=_GELU, every=6, windows=True),
    "gemma4_text": _GEMMA4_TEXT,
    "gemma4_unified_text": _GEMMA4_TEXT,
    "phi3": Architecture("phi3", _SLIDING),
    "gpt_oss": Architecture(
        "gpt-oss", (*_LOCAL, *_SLIDING, ("expert_feed_forward_length", "intermediate_size")), rules=_GPT_OSS, every=2,
        windows=True,
    ),
    "lfm2": Architecture("lfm2", (("shortconv.l_cache", "conv_L_cache"),), rules=_CONVOLUTION, computed=_convolutions),
    "lfm2_moe": Architecture(
        "lfm2moe", (*_NUMBER, ("shortconv.l_cache", "conv_L_cache")), computed=_expert_convolutions,
        rules=(
            *_CONVOLUTION, *_experts(f"{_BLOCK}feed_forward.experts", "w1", "w3", "w2"),
            Rule(f"{_BLOCK}feed_forward.expert_bias", (Target("blk.{n}.exp_probs_b.bias"),)),
        ),
        fixed=_SCORED,
    ),
    "granite": Architecture("granite", _SCALES),
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "granitemoehybrid": replace(_GRANITE_HYBRID, variant=_granite4),
    "olmo2": Architecture("olmo2"),
    "arcee": Architecture("arcee", activation="relu2"),
    "seed_oss": Architecture("seed_oss"),
    "ernie4_5": Architecture("ernie4_5"),
    "hunyuan_v1_dense": Architecture("hunyuan-dense"),
}  # fmt: skip
