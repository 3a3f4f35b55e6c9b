"""Masks of rows padded on the right, by kind of layer, made without a wait for the device.

    full attention     causal; nothing has to be kept where torch's kernel is causal by itself
    sliding attention  causal, within the window
    recurrent layers   none: padding comes after the row's tokens

Given a mask of ones, transformers asks the device for each kind whether it hides a token, and the host waits. A model with
several kinds of layers takes a mask for each in its place, as transformers' `generate` gives it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

SLIDING = "sliding_attention"
RECURRENT = ("linear_attention", "conv", "hybrid", "hybrid_sliding")  # they pass a state on from token to token
STATEFUL = LinearAttentionLayer, LinearAttentionAndFullAttentionLayer  # layers of transformers' cache
Masks = dict[str, Tensor | None]


def recurrent_kinds(config: Any) -> list[str]:
    """The kinds of layers of a model with this configuration that pass a state on from each token to the next."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return [kind for kind in RECURRENT if kind in kinds]


def states_are_cached(config: Any) -> bool:
    """Whether layers of a model with this configuration pass states on, and all keep what they need in transformers' cache.

    Layers that keep still more, as an indexer's keys, are of other classes.
    """
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    return bool(kinds & set(STATEFUL)) and kinds <= {*STATEFUL, DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}


def masks_by_kind(config: Any, ids: Tensor, dtype: torch.dtype) -> Masks | None:
    """The masks of `ids` (rows, tokens), for a model whose states are of `dtype`.

    None for a configuration without recurrent layers, or with a limit of attention that its kinds of layers do not name.
    """
    own, kinds = config.get_text_config(), recurrent_kinds(config)
    limited = any(getattr(own, name, None) for name in ("sliding_window", "attention_chunk_size"))
    slides = SLIDING in (getattr(own, "layer_types", None) or ())
    if not kinds or (limited and not slides) or "hybrid_sliding" in kinds:
        return None
    states = torch.empty(*ids.shape, 0, dtype=dtype, device=ids.device)  # of which only the shape is read
    found = masks_of(create_causal_mask(own, states, None, None))
    return found | {SLIDING: create_sliding_window_causal_mask(own, states, None, None)} if slides else found


def masks_of(full: Tensor | None) -> Masks:
    """The masks of each kind of layer without a window, given that of attention; padding reaches no state."""
    return {"full_attention": full, "hybrid": full, "linear_attention": None, "conv": None}
