"""An adapter in a text model, ready to compute: the pairs in their places, the products' dtype, the fused pieces."""

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
from lorakeet.models.kernels import use_kernels
from lorakeet.models.streaming.model import hold
from lorakeet.models.text.model import TextModel


def begin_adapter(
    text: TextModel,
    plan: Plan,
    *,
    seed: int,
    token_ids: tuple[int, ...] = (),
    name: str = "default",
    directions: Mapping[str, Tensor] | None = None,
    begun: Callable[[nn.Module], None] | None = None,
) -> None:
    """Puts the new pairs of `plan` into `text` as the adapter `name`, and makes the model compute as it will be trained.

    `token_ids` are those of added tokens, `directions` by path the A (rank, in) of pairs whose start is measured
    (core/initialise.MEASURED); `begun` is told each pair. Raises ConfigError where the plan does not fit the model.
    """
    hold(text.model, plan)
    inject(text.model, plan, name, seed=seed, token_ids=token_ids, begun=begun)
    drops = any(entry.dropout for entry in plan.entries) or bool(drop_rates(text))
    text.shares_prefix = text.shares_prefix and not drops  # each row drops numbers of its own
    parameters = trained_parameters(text.model, name) if directions else {}
    with torch.no_grad():
        for path, A in (directions or {}).items():
            parameters[f"{path}.A"].copy_(A)
    _compute_in_blocks(text)


def drop_rates(text: TextModel) -> dict[str, float]:
    """The chances in which the model leaves numbers out in training, by their names in config.json."""
    settings = vars(text.model.config.get_text_config())
    return {name: rate for name, rate in settings.items() if "drop" in name and isinstance(rate, float) and rate}


def put_adapter(text: TextModel, adapter: Adapter, name: str = "default") -> None:
    """Puts a finished `adapter` into `text`, and makes the model compute as in training; ConfigError where it does not fit."""
    hold(text.model, plan_of(text.model, adapter))
    attach(text.model, adapter, name)
    _compute_in_blocks(text)


@contextmanager
def as_trained(text: TextModel) -> Iterator[None]:
    """A context in which `text` computes as in training also while no adapter is in it."""
    bare = not adapter_names(text.model)
    if bare:
        _compute(text)
    try:
        yield
    finally:
        if bare:
            unfuse(text.model)


def _compute_in_blocks(text: TextModel) -> None:
    """With a whole block in one call of C, where that can be; streamed blocks come in by their parts."""
    _compute(text)
    if text.streamed is None:
        fuse_blocks(text.model, text.family, TrainedBlock)


def _compute(text: TextModel) -> None:
    use_products(text.model, text.products)
    fuse(text.model)
    use_kernels(text.model, text.kernels)
