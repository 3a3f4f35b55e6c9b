"""The models of the first hour by name: published shapes, and in a rehearsal two narrow blocks for all of them."""

from __future__ import annotations

from typing import Any

from plan_accuracy import published_shape

from first_hour.losses import small_shape

MODELS = {"1B": "meta-llama/Llama-3.2-1B", "8B": "meta-llama/Llama-3.1-8B"}


def shape_of(name: str, *, toy: bool) -> dict[str, Any]:
    return small_shape(toy=True) if toy else published_shape(MODELS[name])


def training_flops(shape: dict[str, Any], lengths: list[int], rank: int) -> int:
    """Of a step over packed rows of these lengths, every token but the first of a row a target, as far as training needs them.

    Twice the frozen weights forward and twice for dX, the head the same, six times the pairs, attention's scores under the
    causal mask; what a program computes again does not count.
    """
    hidden, heads, kv = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    head, layers, inner = shape.get("head_dim") or hidden // heads, shape["num_hidden_layers"], shape["intermediate_size"]
    tokens, targets = sum(lengths), sum(lengths) - len(lengths)
    weights = layers * (2 * hidden * heads * head + 2 * hidden * kv * head + 3 * hidden * inner)
    sides = 2 * (hidden + heads * head) + 2 * (hidden + kv * head) + 3 * (hidden + inner)  # of the seven matrices of a block
    scores = sum(length * (length + 1) // 2 for length in lengths)
    frozen = 4 * (tokens * weights + targets * shape["vocab_size"] * hidden)
    return frozen + 6 * tokens * layers * rank * sides + 12 * scores * heads * head * layers
