"""Trained rows for added tokens: the embedding (and head) grow by frozen rows, and can shrink again."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.layers.extras import TokenRowsEmbedding, TokenRowsHead, TokenRowsLayer, TrainedRows
from lorakeet.core.plan import ExtraEntry
from lorakeet.models import modules


def put_rows(model: nn.Module, entry: ExtraEntry, name: str, ids: tuple[int, ...], values: Tensor | None = None) -> None:
    """Adds trained rows for `ids` under `name` to the layer at `entry.path` and to a head tied to it.

    The frozen weight grows by the mean of its rows, which is also the initial value of the trained rows, unless `values`
    (rows, hidden) are given. Old rows keep their bits.
    """
    layer = _layer(model, entry.path)
    tied = _layer(model, entry.tied) if entry.tied else None
    mean = layer.weight[: layer.rows_before].mean(0, dtype=torch.float32)
    _grow([layer] if tied is None else [layer, tied], max(ids) + 1, mean)
    _set_vocabulary(model, layer.weight.shape[0])
    start = mean.expand(len(ids), -1) if values is None else values.to(mean.device)
    rows = TrainedRows(ids, start, tokens=entry.tokens, tied=entry.tied)
    layer.attach(name, rows)
    if tied is not None:
        tied.attach(name, rows)


def shrink(model: nn.Module) -> None:
    """Removes the rows that `put_rows` added to frozen weights."""
    shorter: dict[int, nn.Parameter] = {}  # by the identity of the grown weight, so that tied ones stay tied
    for _, layer in modules.adapted_layers(model):
        if isinstance(layer, TokenRowsLayer) and layer.weight.shape[0] > layer.rows_before:
            grown = layer.weight
            if id(grown) not in shorter:
                shorter[id(grown)] = nn.Parameter(grown.detach()[: layer.rows_before].clone(), requires_grad=False)
            _set_weight(layer.original, shorter[id(grown)])
            _set_vocabulary(model, layer.rows_before)


def _layer(model: nn.Module, path: str) -> TokenRowsLayer:
    module = cast(nn.Module, modules.find(model, path))
    if isinstance(module, TokenRowsLayer):
        return module
    layer = TokenRowsEmbedding(module) if isinstance(module, nn.Embedding) else TokenRowsHead(module)
    layer.train(module.training)
    modules.replace(model, path, layer)
    return layer


def _grow(layers: list[TokenRowsLayer], rows: int, mean: Tensor) -> None:
    weight = layers[0].weight
    missing = rows - weight.shape[0]
    if missing <= 0:
        return
    grown = nn.Parameter(torch.cat([weight.detach(), mean.to(weight.dtype).expand(missing, -1)]), requires_grad=False)
    for layer in layers:
        _set_weight(layer.original, grown)


def _set_weight(module: nn.Module, weight: nn.Parameter) -> None:
    any_module = cast(Any, module)
    any_module.weight = weight
    if isinstance(module, nn.Embedding):
        any_module.num_embeddings = weight.shape[0]
    else:
        any_module.out_features = weight.shape[0]


def _set_vocabulary(model: nn.Module, rows: int) -> None:
    config = getattr(model, "config", None)
    if config is not None:
        config.get_text_config().vocab_size = rows
