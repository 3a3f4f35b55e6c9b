"""`export.gguf_layout`: metadata of each family, and what llama.cpp cannot compute is refused or said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakeet.errors import ConfigError
from lorakeet.export.gguf_layout import model_layout

LLAMA: dict[str, Any] = {
    "model_type": "llama", "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "hidden_act": "silu",
}  # fmt: skip


def test_metadata_of_a_llama() -> None:
    layout = model_layout(LLAMA, "x")
    assert layout.metadata["rope.freq_base"] == 5e5 and layout.metadata["attention.head_count_kv"] == 2
    assert layout.metadata["attention.key_length"] == 8 and not layout.notes and not layout.rope


def test_rows_of_q_and_k_are_permuted_by_their_own_heads_and_nothing_else() -> None:
    layout = model_layout(LLAMA, "x")
    weight = torch.arange(32.0)[:, None].expand(32, 3)
    change = layout.change_of("model.layers.0.self_attn.q_proj.weight")
    assert change is not None and change(weight)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    key = layout.change_of("model.layers.0.self_attn.k_proj.weight")
    assert key is not None and key(weight[:16])[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert layout.change_of("model.layers.0.self_attn.v_proj.weight") is None
    assert layout.change_of("model.norm.weight") is None
    assert model_layout({**LLAMA, "model_type": "qwen2"}, "x").change_of("model.layers.0.self_attn.q_proj.weight") is None


def test_gemma_norms_gain_one() -> None:
    layout = model_layout({**LLAMA, "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}, "x")
    change = layout.change_of("model.layers.0.self_attn.q_norm.weight")
    assert change is not None and change(torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"hidden_act": "relu"}, "The activation is 'relu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        (
            {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 99},
            "query_pre_attn_scalar is 99",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model_layout({**LLAMA, **changes}, "x")


def test_a_sliding_window_that_llama_cpp_ignores_is_said() -> None:
    layout = model_layout({**LLAMA, "model_type": "mistral", "sliding_window": 16}, "x")
    assert "last 16 tokens" in layout.notes[0]
    assert not model_layout({**LLAMA, "model_type": "mistral", "sliding_window": 64}, "x").notes


def test_phi3_longrope() -> None:
    rope = {"type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
    found = model_layout({**LLAMA, "model_type": "phi3", "rope_scaling": rope, "original_max_position_embeddings": 16}, "x")
    assert set(found.rope) == {"rope_factors_long.weight", "rope_factors_short.weight"}
    assert found.metadata["rope.scaling.attn_factor"] == pytest.approx((1 + 0.5) ** 0.5)
