"""The tiny Llama of tiny.models in mlx-lm's own classes, with the same weights."""

from __future__ import annotations

from typing import Any

from tiny.models import tiny_model


def mlx_llama() -> Any:
    import mlx.core as mx
    from mlx_lm.models.llama import Model, ModelArgs

    theirs = tiny_model("llama")
    config = theirs.config
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=False,
        )
    )
    model.load_weights([(name, mx.array(tensor.numpy())) for name, tensor in theirs.state_dict().items()])
    return model


def mlx_logits(model: Any, ids: Any) -> Any:
    """Logits for token ids (1, length), as a numpy array."""
    import mlx.core as mx
    import numpy as np

    return np.array(model(mx.array(ids)))
