"""Whether a model to be served fits on its GPU, with keys and values of all slots: found on shapes, before weights are read.

Keys, values and states are allocated by the first request. So a server that does not fit would start, and then fail.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from lorakeet.errors import EnvironmentProblem
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.cuda import gpu_bytes_left
from lorakeet.memory.free import fits_now
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, step
from lorakeet.models.placement import device_for, text_dtype_for
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import empty_packed
from lorakeet.models.text.from_config import model_from_config
from lorakeet.models.text.load import ReadBefore
from lorakeet.models.text.row_masks import recurrent_kinds

# Settings of models that keep fewer keys and values than layers, heads and widths say.
FEWER = ("kv_lora_rank", "num_kv_shared_layers", "num_global_key_value_heads", "attention_k_eq_v", "multi_query")


def require_gpu_memory(spec: ModelSpec, before: ReadBefore, slots: int, context: int, remedy: str) -> None:
    """Raises EnvironmentProblem with the remedy if the model and its cache take more than its CUDA device has free.

    Both are lower bounds, so that nothing is refused that fits. Elsewhere, and for a model of which nothing was read, it does
    nothing.
    """
    device = device_for(spec.device)
    if device.type != "cuda" or before.config is None or before.source is None:
        return
    dtype = text_dtype_for(spec.dtype, device)
    model = empty_packed(before.config, dtype, spec.quantize, before.source)
    weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    cache = least_cache_bytes(before.config, slots, context, dtype)
    if fits_now(weights + cache, device):
        return
    raise EnvironmentProblem(
        f"{spec.path} cannot be served on {device}: its weights take {bytes_text(weights)}, and the cache of {slots} texts "
        f"of {context:,} tokens {bytes_text(cache)}, of {bytes_text(gpu_bytes_left(device))} that are free there. No weights "
        f"were read. To use it, {remedy}."
    )


def least_cache_bytes(config: Any, slots: int, context: int, dtype: torch.dtype) -> int:
    """Bytes of keys, values and states of `slots` texts of `context` tokens; 0 where the configuration does not tell them for
    certain."""
    text = config.get_text_config()
    if recurrent_kinds(config):
        return _bytes_with_states(config, slots, context, dtype)
    if any(getattr(text, name, None) for name in FEWER):
        return 0
    heads, layers = getattr(text, "num_attention_heads", 0), getattr(text, "num_hidden_layers", 0)
    if not isinstance(heads, int) or not isinstance(layers, int) or not heads:
        return 0
    width = getattr(text, "head_dim", None) or int(text.hidden_size) // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    return 2 * layers * slots * context * int(kept) * int(width) * dtype.itemsize


def _bytes_with_states(config: Any, slots: int, context: int, dtype: torch.dtype) -> int:
    """The bytes of a cache after a step on shapes, where layers pass states on; 0 if the model's code does not run on shapes."""
    own = deepcopy(config)
    own.get_text_config()._experts_implementation = "batched_mm"  # which asks no device for the experts of a token
    cache = KeyValues(slots=slots, capacity=context)
    with quiet_transformers():
        text = model_from_config(own, name="", dtype=dtype, products=dtype, device="meta", attention="sdpa")
        try:
            step(replace(text, masks_by_kind=True), cache, [CacheRow(0, 0, (0,), {})])
        except RuntimeError:
            return 0
    return cache.bytes
