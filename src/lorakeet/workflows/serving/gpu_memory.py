"""Whether a model to be served fits on its GPU, with keys and values of all slots: found on shapes, before weights are read.

Keys and values are allocated by the first request. So a server that does not fit would start, and then fail.
"""

from __future__ import annotations

from typing import Any

import torch

from lorakeet.errors import EnvironmentProblem
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.cuda import gpu_bytes_left
from lorakeet.memory.free import fits_now
from lorakeet.models.placement import device_for, text_dtype_for
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import empty_packed
from lorakeet.models.text.load import ReadBefore

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
        f"{spec.path} cannot be served on {device}: its weights take {bytes_text(weights)}, and keys and values of {slots} texts "
        f"of {context:,} tokens {bytes_text(cache)}, of {bytes_text(gpu_bytes_left(device))} that are free there. No weights "
        f"were read. To use it, {remedy}."
    )


def least_cache_bytes(config: Any, slots: int, context: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of `slots` texts of `context` tokens; 0 where the configuration does not tell them for certain."""
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in FEWER):
        return 0
    heads, layers = getattr(text, "num_attention_heads", 0), getattr(text, "num_hidden_layers", 0)
    if not isinstance(heads, int) or not isinstance(layers, int) or not heads:
        return 0
    width = getattr(text, "head_dim", None) or int(text.hidden_size) // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    return 2 * layers * slots * context * int(kept) * int(width) * dtype.itemsize
