"""Causal attention over packed rows: no padding, no attention across rows. Registered with transformers by name.

The model runs on one sequence (1, tokens) with the keyword argument `row_lengths=(n₁, n₂, …)` and position ids that start again
at each row. Each row attends only to itself, so the cost is Σn² and not (Σn)²; tokens after the last row are padding.

On a CPU, core/fused/packed_attention computes the rows (torch's own bf16 backward is several times slower), or, with capped
scores, sinks or dropout, each row is written out. On a GPU in half precision, torch's flash kernel computes all rows at once
(kernels/flash_varlen), else its memory-efficient one (kernels/efficient_varlen); sinks only rescale what these give
(kernels/row_sinks). With capped scores or dropout, blocks of queries are computed (kernels/blockwise_rows). So no probabilities
of a whole row are kept there.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from lorakeet.core.fused.packed_attention import AttentionRule, CausalRows, causal_rows
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.kernels.blockwise_rows import BlockwiseRows
from lorakeet.kernels.choose import BLOCKWISE, capped_rows, packed_rows
from lorakeet.kernels.device import is_cpu
from lorakeet.kernels.efficient_varlen import DTYPES, EfficientVarlen
from lorakeet.kernels.flash_varlen import STEP, FlashVarlen
from lorakeet.kernels.row_sinks import SinkRows, takes_sinks
from lorakeet.models.families import CHOOSING, CHOSEN_TOKENS

VARLEN = "lorakeet_varlen"
CHUNKED = "chunked_attention"
# What some models give their attention: biases of positions, a cache, sinks under another name, and which tokens were chosen.
UNKNOWN = ("position_bias", "cache", "sinks", "indices", "block_indices")


def register() -> None:
    """Registers the attention with transformers under the name VARLEN; idempotent."""
    AttentionInterface.register(VARLEN, packed_attention)
    AttentionMaskInterface.register(VARLEN, lambda *_, **__: None)  # no mask


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **settings: Any
) -> tuple[Tensor, None]:
    """Returns the outputs (1, tokens, heads, d) of query (1, heads, tokens, d), key and value (1, kv heads, tokens, d).

    Settings used: `row_lengths`, `row_prefix` (tokens before all rows that belong to each), `row_cache` (earlier tokens
    of the rows), `row_products` (dtype of the products on a CPU; fp32 by default), `scaling`, `dropout`, `sliding_window`,
    `softcap`, `s_aux` (a sink's score for each head). Raises EnvironmentProblem for anything else (position biases, non-causal
    attention), so that nothing is ignored.
    """
    lengths = settings.get("row_lengths")
    _refuse_unknown(module, (query, key), lengths, attention_mask, settings)
    rows, prefix = _chunks(module, settings, cast("tuple[int, ...]", lengths)), cast(int, settings.get("row_prefix", 0))
    scale = settings.get("scaling") or 1 / math.sqrt(query.shape[-1])
    window, softcap, dropout = _window(module, settings), settings.get("softcap"), settings.get("dropout") or 0.0
    sinks = settings.get("s_aux")
    if (cache := settings.get("row_cache")) is not None:  # generation: models/generate/kv_cache
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        return cast(Tensor, cache.attend(module.layer_idx, q, k, v, AttentionRule(scale, window, softcap, sinks)))[None], None
    rule, laid = AttentionRule(scale, window, softcap, sinks), (rows, prefix)
    products = settings.get("row_products") or torch.float32
    if not is_cpu(query.device) and query.dtype == key.dtype == value.dtype and query.dtype in DTYPES:
        found = _on_a_gpu((query, key, value), laid, rule, dropout, products)
        if found is not None:
            return found, None
    plain = softcap is None and sinks is None and dropout == 0.0 and (window is None or prefix + max(rows) <= window)
    if plain and is_cpu(query.device) and query.shape[-1] == value.shape[-1]:
        return causal_rows(query, key, value, rows, scale, products, prefix), None
    outputs = []
    parts = [prefix, *rows, query.shape[2] - prefix - sum(rows)]  # padding is a row of its own
    first, *others = zip(*(torch.split(states, parts, dim=2) for states in (query, key, value)), strict=True)
    for number, own in enumerate(others):
        q, k, v = (torch.cat(pair, dim=2) if prefix else pair[1] for pair in zip(first, own, strict=True))
        if softcap is not None or sinks is not None:
            out = _written_out(q, k, v, rule, dropout)
        else:
            mask = _band(q.shape[2], window, q.device) if window is not None and q.shape[2] > window else None
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        outputs.append(out[:, :, prefix if number else 0 :].transpose(1, 2))  # the prefix's own outputs: once
    return torch.cat(outputs, dim=1), None


def _on_a_gpu(
    states: tuple[Tensor, Tensor, Tensor],
    laid: tuple[tuple[int, ...], int],
    rule: AttentionRule,
    dropout: float,
    products: torch.dtype,
) -> Tensor | None:
    """Attention by a kernel that keeps no probabilities; None if there is none.

    Heads are padded with zeros to one width in multiples of 8, which changes no score: DeepSeek's values are narrower than its
    keys.
    """
    (rows, prefix), (scale, window, cap, sinks) = laid, rule
    width, of_values = max(each.shape[-1] for each in states), states[2].shape[-1]
    query, key, value = (_widened(each, width + -width % STEP) for each in states)
    shape, capped = (query.shape[1], key.shape[1], query.shape[-1]), cap is not None or dropout > 0
    own = (capped_rows(query, products) if capped else packed_rows(query, products, *shape, rows, prefix)).offers
    if sinks is not None and own in (FlashVarlen, EfficientVarlen) and not takes_sinks(own, query, *shape):
        own = BLOCKWISE.offers
    if own is None:
        return None
    if own is BlockwiseRows:
        seed = BlockwiseRows.drawn_seed() if dropout else 0
        kernel: Any = BlockwiseRows(rows, scale, prefix, window, cap, dropout, seed)
    else:
        kernel = own(rows, scale, prefix, window)
    given = query, key, value, *([] if sinks is None else [sinks]), kernel
    function = CausalRows if sinks is None else SinkRows
    out = cast(Tensor, function.apply(*given))  # type: ignore[no-untyped-call]
    return out if of_values == value.shape[-1] else out[..., :of_values]


def _widened(states: Tensor, width: int) -> Tensor:
    """The states with zeros behind the numbers of each head."""
    return states if states.shape[-1] == width else nn.functional.pad(states, (0, width - states.shape[-1]))


def _refuse_unknown(
    module: nn.Module, states: tuple[Tensor, Tensor], lengths: Any, mask: Tensor | None, settings: dict[str, Any]
) -> None:
    kind, (query, key) = type(module).__name__, states
    if lengths is None:
        raise EnvironmentProblem(f"{kind} did not pass row_lengths to its attention; load this model with attention: sdpa.")
    total, longest = (settings.get("row_prefix", 0) + of_rows for of_rows in (sum(lengths), max(lengths)))
    if (cache := settings.get("row_cache")) is not None:
        _refuse_long_text(module, cache.longest, settings)  # earlier tokens are attended to as well
    if query.shape[0] != 1 or query.shape[2] < total:
        raise EnvironmentProblem(
            f"{kind} gave its attention queries of shape {tuple(query.shape)} for rows of {total} tokens in all; "
            "load this model with attention: sdpa."
        )
    unknown = [name for name in UNKNOWN if settings.get(name) is not None]
    if cache is None and key.shape[2] != query.shape[2]:
        unknown.append(f"{key.shape[2]} keys for {query.shape[2]} queries")  # such as summaries of tokens (DeepSeek-V4)
    if settings.get("is_causal", getattr(module, "is_causal", True)) is False:
        unknown.append("is_causal=False")
    if mask is not None:
        unknown.append("attention_mask")
    limit = _limit_in_mask(module, settings)
    if limit is not None and longest > limit and not _divides(module, settings):
        unknown.append(f"a window of {limit} tokens that only its mask has, for a row of {longest} tokens")
    alone = len(lengths) == 1 and cache is None  # its places are those of the batch
    if (constant := _constant_up_to(module)) is not None and not alone and total >= constant:
        unknown.append(f"a temperature by position, constant up to {constant:g}, for {total} tokens")
    if unknown:
        raise EnvironmentProblem(f"{kind} uses {', '.join(unknown)}, which row attention does not have; use attention: sdpa.")


def _refuse_long_text(module: nn.Module, longest: int, settings: dict[str, Any]) -> None:
    """Raises ConfigError where a text of `longest` tokens over a cache would need a mask or a temperature by position."""
    limit, constant = _limit_in_mask(module, settings), _constant_up_to(module)
    most = min((number for number in (limit, constant and int(constant) - 1) if number is not None), default=None)
    if most is not None and longest > most:
        raise ConfigError(
            f"{type(module).__name__} attends otherwise beyond {most} tokens, by a mask or a temperature that row attention does "
            f"not have, and a text may have {longest} tokens. Limit them: --context {most} for lorakeet serve."
        )


def _constant_up_to(module: nn.Module) -> float | None:
    """Returns the position below which a temperature by position (Llama 4's layers without rotation) is constant, or None."""
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return None
    found: float | None = getattr(module, "floor_scale", None)
    return found


def temperature_start(config: Any) -> int | None:
    """The place in a batch from which on a query's temperature depends on its place there (Llama 4); None for most models."""
    own = config.get_text_config()
    tuned = getattr(own, "attn_temperature_tuning", False) and not all(getattr(own, "no_rope_layers", None) or [True])
    return int(own.floor_scale) - 1 if tuned else None


def chooses_beyond(model: nn.Module) -> int | None:
    """The most tokens of a row that all attend to each earlier one; None for a model that chooses none.

    Beyond, it attends to those with the best scores. Many scores are exactly 0, and which of these are taken depends on how many
    there are in all, padding included.
    """
    own = cast(Any, model.config).get_text_config()
    sizes = ([getattr(own, key, None) for key in keys] for keys in CHOSEN_TOKENS)
    found = [math.prod(cast("list[int]", each)) for each in sizes if None not in each]
    chooses = any(path.rpartition(".")[2] in CHOOSING for path, _ in model.named_modules())
    return min(found) if found else 0 if chooses else None


def _divides(module: nn.Module, settings: dict[str, Any]) -> bool:
    """Whether rows are cut into the chunks of a layer: each attends to itself, so that packed rows are their chunks."""
    alone = not settings.get("row_prefix", 0) and settings.get("row_cache") is None
    return alone and _layer_kind(module) == CHUNKED


def _chunks(module: nn.Module, settings: dict[str, Any], rows: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths of the rows, or of their chunks in a layer that attends within chunks (Llama 4)."""
    if not _divides(module, settings):
        return rows
    size = cast(int, cast(Any, module.config).attention_chunk_size)
    return tuple(min(size, row - start) for row in rows for start in range(0, row, size))


def _layer_kind(module: nn.Module) -> str:
    """The kind of a layer in its configuration, by which transformers chooses its mask; empty where none is listed."""
    kinds, layer = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    return str(kinds[layer]) if kinds and layer is not None else ""


def _window(module: nn.Module, settings: dict[str, Any]) -> int | None:
    """The window of a layer: the one it passes, or that of its mask, for layers that are listed as sliding (Qwen2-MoE)."""
    if "sliding_window" in settings or _layer_kind(module) != "sliding_attention":
        return cast("int | None", settings.get("sliding_window"))
    return getattr(module.config, "sliding_window", None) or None


def _limit_in_mask(module: nn.Module, settings: dict[str, Any]) -> int | None:
    """Returns the window or chunk that only a model's mask has, and no list of kinds of layers (Llama 4's chunks), or None."""
    if "sliding_window" in settings or _layer_kind(module) in ("full_attention", "sliding_attention"):
        return None
    config = getattr(module, "config", None)
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _band(n: int, window: int | None, device: torch.device) -> Tensor:
    """Returns a mask (n, n), True where query i may attend to key j: j ≤ i and, with a window, i − j < window."""
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def _written_out(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, dropout: float) -> Tensor:
    """Returns attention whose scores are capped by cap·tanh(score / cap) before the mask (Gemma 2), and whose softmax, in fp32,
    has a score more for each head, which takes a share of it and gives nothing (the sinks of gpt-oss).
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)) * (rule.scale if rule.cap is None else rule.scale / rule.cap)
    if rule.cap is not None:
        scores = torch.tanh(scores) * rule.cap
    scores = scores.masked_fill(~_band(q.shape[2], rule.window, q.device), float("-inf"))
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks.view(1, -1, 1, 1).to(scores.dtype).expand(*scores.shape[:3], 1)], dim=-1)
    shares = scores.softmax(-1, dtype=torch.float32)[..., : k.shape[2]].to(v.dtype)
    return nn.functional.dropout(shares, dropout) @ v
