"""Tiny random models of every tested family, with the real transformers classes, and a saved Llama folder with a tokenizer.

`tiny_model("llama")` builds one in fp32, seeded, in eval mode. `FAMILIES` lists the names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 96
HIDDEN = 32
LAYERS = 2

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
_ROUTED: dict[str, Any] = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 128,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

MOST_KEPT = 1 << 20  # bytes of the files of a model that are kept
_SAVED: dict[str, tuple[dict[str, bytes], torch.Tensor]] = {}  # by what it is made of: its files, and the generator afterwards

# name: (config class, model class, arguments); tied embeddings where the released models of the family tie them
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SHARED),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_SHARED, "sliding_window": 8}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_SHARED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_SHARED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_SHARED, "head_dim": 8, "tie_word_embeddings": True}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_SHARED, **_MOE, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_SHARED, **_MOE, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_SHARED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_SHARED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "tie_word_embeddings": True},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_SHARED, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
}
_NOT_TESTED_THROUGHOUT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {**_SHARED, "head_dim": 8, "global_head_dim": 8, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
         "sliding_window": 8, "tie_word_embeddings": True, "final_logit_softcapping": 30.0},
    ),
    "gpt_oss": (
        "GptOssConfig", "GptOssForCausalLM",
        {**_SHARED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "swiglu_limit": 2.0},
    ),
    "hrm_text": ("HrmTextConfig", "HrmTextForCausalLM", {**_SHARED, "num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 2}),
    "hunyuan_moe": (
        "HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", {**_SHARED, "head_dim": 8, "num_experts": 4, "moe_topk": 2}
    ),
    "afmoe": (
        "AfmoeConfig", "AfmoeForCausalLM",
        {**_SHARED, **_MOE, "head_dim": 8, "num_dense_layers": 1},
    ),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", {**_SHARED, **_MOE, **_ROUTED, "head_dim": 8}),
    "ernie_moe": (
        "Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM",
        {**_SHARED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    ),
    "deepseek_v3": (
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {**_SHARED, **_MOE, **_ROUTED, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4}),
}


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A frozen random model of `family` in fp32 and eval mode; `changes` go into its configuration."""
    config_class, model_class, arguments = {**FAMILIES, **_NOT_TESTED_THROUGHOUT}[family]
    config = getattr(transformers, config_class)(**{**arguments, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)
    return model.requires_grad_(False).eval()


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
_CORPUS = [
    "This drug worked well for my pain and I had no side effects at all.",
    "It was terrible, the side effects made me feel sick every day.",
    "positive negative neutral review rating answer system user assistant",
    "The doctor gave me this for anxiety. I have been taking it for two weeks now.",
]


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of about 300 tokens with a ChatML template; any text can be encoded and decoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=1,
    )
    core.train_from_iterator(_CORPUS, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny_llama(folder: Path, *, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Writes a tiny random model with its tokenizer as config.json, model.safetensors and tokenizer files; returns `folder`.

    The files of a small one are kept, and written again where the same model is wanted again.
    """
    made_of = repr((family, seed, sorted(changes.items())))
    if made_of not in _SAVED:
        new = not folder.exists()
        _save(folder, family, seed, changes)
        files = {path.name: path.read_bytes() for path in folder.iterdir()} if new else {}
        if 0 < sum(map(len, files.values())) <= MOST_KEPT:
            _SAVED[made_of] = files, torch.get_rng_state()
        return folder
    files, state = _SAVED[made_of]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.set_rng_state(state)  # as making the model leaves it
    return folder


def _save(folder: Path, family: str, seed: int, changes: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = tiny_model(family, seed=seed, **{**ids, "max_position_embeddings": 256, "tie_word_embeddings": True, **changes})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
