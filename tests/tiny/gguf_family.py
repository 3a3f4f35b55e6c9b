"""Tiny models of families whose tensors transformers puts together in its own ways, written as .gguf files as llama.cpp does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tiny.gguf_file import add_tokenizer
from tiny.models import tiny_model, tiny_tokenizer


def write_family_gguf(path: Path, family: str, **changes: Any) -> Any:
    """Writes `path` in F32 and returns the fp32 model that it was made of: gpt2 (with a head of its own), bloom or qwen2."""
    import gguf

    tokenizer = tiny_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer), **changes)
    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if family == "qwen2":
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, tokenizer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, last = name.rpartition(".")
        own = names.get_name(module) or names.get_name(module.removeprefix("transformer."))  # BLOOM is known without its head
        writer.add_tensor(f"{own}.{last}", _as_stored(family, name, tensor.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _as_stored(family: str, name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """As llama.cpp's converter stores it: Conv1D weights turned, BLOOM's queries, keys and values one after the other."""
    if family == "gpt2" and weight.ndim == 2 and ".h." in name:
        return np.ascontiguousarray(weight.T)
    if "query_key_value" in name:
        heads = weight.reshape(config.num_attention_heads, 3, -1, *weight.shape[1:])
        return np.ascontiguousarray(heads.swapaxes(0, 1).reshape(weight.shape))
    return weight
