"""A tiny Llama written as a .gguf file the way llama.cpp's converter writes one, with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorakeet.quant.gguf_codes import fit_gguf_scales
from tiny.models import tiny_model, tiny_tokenizer

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_tiny_gguf(path: Path, kind: str | Sequence[str] | None = None, **changes: Any) -> Any:
    """Writes `path` and returns the fp32 model that it was made of; matrices that divide into blocks of type `kind` are packed.

    Of several kinds the matrices of the blocks take one after the other. `changes` are settings of the model's configuration.
    """
    turns = None if kind is None or isinstance(kind, str) else cycle(kind)
    import gguf

    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True, **changes)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, tokenizer)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            weight = _as_stored(name, tensor.numpy(), config)
            own = kind if turns is None else next(turns) if name.endswith("proj.weight") else None
            raw = None if own is None or weight.ndim < 2 else gguf.GGMLQuantizationType[str(own)]
            if raw is not None and weight.shape[-1] % gguf.GGML_QUANT_SIZES[raw][0] == 0:
                writer.add_tensor(_gguf_name(name), _blocks(weight, raw), raw_dtype=raw)
            else:
                writer.add_tensor(_gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _blocks(weight: np.ndarray, kind: Any) -> np.ndarray:
    """The weight in blocks: by the gguf package, or, of the K types, which it does not write, by Lorakeet."""
    import gguf

    if not kind.name.endswith("_K"):
        return gguf.quants.quantize(weight, kind)
    return fit_gguf_scales(torch.from_numpy(np.ascontiguousarray(weight)), kind.name).packed.numpy()


def add_tokenizer(writer: Any, tokenizer: Any) -> None:
    """Writes the keys of a byte-level BPE tokenizer."""
    import json

    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(core["vocab"], key=core["vocab"].get))
    writer.add_token_types(
        [3 if token in tokenizer.all_special_tokens else 1 for token in sorted(core["vocab"], key=core["vocab"].get)]
    )
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _as_stored(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """llama.cpp rotates neighbours where transformers rotates halves, so q and k rows stand in another order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns))
