"""The configuration of a small Llama, for what needs no weights."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
