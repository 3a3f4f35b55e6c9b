"""Adds adapters to a text model, ready to compute: pairs, the products' dtype, fused modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter
from lorakeet.core.fused.trained_block import TrainedBlock
from lorakeet.core.plan import Plan
from lorakeet.models.fits import plan_of
from lorakeet.models.fuse import fuse, fuse_blocks, unfuse
from lorakeet.models.inject import adapter_names, attach, inject, trained_parameters, use_products
from lorakeet.models.streaming.model import make_resident
from lorakeet.models.text.load import set_attention
from lorakeet.models.text.model import TextModel


def initialise_adapter(
    text: TextModel,
    plan: Plan,
    *,
    seed: int,
    token_ids: tuple[int, ...] = (),
    name: str = "default",
    directions: Mapping[str, Tensor] | None = None,
    on_pair: Callable[[nn.Module], None] | None = None,
) -> TextModel:
    """Adds an adapter `name` with the new pairs of `plan`, fuses modules as training does, and returns `text` as it is trained.

    Its `options` share no prefix where there is dropout: it differs by row. `token_ids` are those of added tokens, `directions`
    by path the A (rank, in) of pairs whose start is measured (core/initialise.MEASURED); `on_pair` is called with each new pair.
    Raises ConfigError if the plan does not fit the model.
    """
    make_resident(text.model, plan)
    inject(text.model, plan, name, seed=seed, token_ids=token_ids, on_pair=on_pair)
    parameters = trained_parameters(text.model, name) if directions else {}
    with torch.no_grad():
        for path, A in (directions or {}).items():
            parameters[f"{path}.A"].copy_(A)
    _fuse_blocks(text)
    drops = any(entry.dropout for entry in plan.entries) or bool(drop_rates(text))
    return text.with_options(share_prefix=False) if drops else text


def drop_rates(text: TextModel) -> dict[str, float]:
    """The model's own dropout rates above 0, by their names in config.json."""
    settings = vars(text.model.config.get_text_config())
    return {name: rate for name, rate in settings.items() if "drop" in name and isinstance(rate, float) and rate}


def add_adapter(text: TextModel, adapter: Adapter, name: str = "default") -> None:
    """Adds a finished `adapter` and fuses modules as training does; ConfigError if it does not fit."""
    make_resident(text.model, plan_of(text.model, adapter))
    attach(text.model, adapter, name)
    _fuse_blocks(text)


@contextmanager
def as_trained(text: TextModel) -> Iterator[None]:
    """A context in which `text` has the fused modules of training even without an adapter."""
    bare = not adapter_names(text.model)
    if bare:
        _fuse(text)
    try:
        yield
    finally:
        if bare:
            unfuse(text.model)


@contextmanager
def own_modules(text: TextModel) -> Iterator[None]:
    """A context in which the model computes with transformers' own modules and eager attention; pairs stay."""
    attention = text.attention
    unfuse(text.model)
    set_attention(text.model, "eager")
    try:
        yield
    finally:
        set_attention(text.model, attention)
        _fuse_blocks(text)


def _fuse_blocks(text: TextModel) -> None:
    """Fuses modules, and whole blocks into one call of C where possible; not those of a streamed model."""
    _fuse(text)
    if text.streamed is None:
        fuse_blocks(text.model, text.family, TrainedBlock)


def _fuse(text: TextModel) -> None:
    use_products(text.model, text.products)
    fuse(text.model)
