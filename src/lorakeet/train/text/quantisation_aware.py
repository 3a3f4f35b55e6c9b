"""Quantisation-aware finish of a merge into a quantised model: a few steps that train the pairs through the quantiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, MutableMapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter
from lorakeet.data.chat import Example
from lorakeet.merge.requantise import Requantised
from lorakeet.merge.straight_through import StraightThroughLinear
from lorakeet.models.modules import find, replace
from lorakeet.models.text.model import TextModel
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.train import schedule
from lorakeet.train.optimizer import Optimizer
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.loss import text_loss
from lorakeet.train.text.task import learning_rate_of, order_of

CLIP = 1.0
RATE = 0.1  # share of the run's rate: at the full rate, 20 steps on SmolLM2 in GPTQ undid part of the error feedback
WARMUP = 0.1  # share of the steps: AdamW's first steps are as long as the rate for any gradient


def quantisation_aware_finish(
    text: TextModel,
    solved: MutableMapping[str, Requantised],
    adapter: Adapter,
    rows: Sequence[Example],
    *,
    steps: int,
    spec: TrainSpec,
    products: torch.dtype,
    on_step: Callable[[int, float], None],
) -> dict[str, PackedBase]:
    """Trains the pairs of `adapter` through the grids of `solved`, whose packed layers are in `text`; returns the new layers.

    The seed is that of the run; the rate rises to `RATE` times the run's and falls linearly. Matrix products run in `products`
    (core/precision), codes are chosen in fp32. `on_step` gets each step and its loss in nats per token. `text` contains the
    returned layers. The latent weights are removed from `solved`: they are as large as the model in fp32.
    """
    layers: dict[str, StraightThroughLinear] = {}
    for path, pair in adapter.pairs.items():
        if path in solved:
            latent = solved[path].latent
            if latent is None:
                raise ValueError(f"{path} was packed without its unrounded weights, which are trained here")
            bias = cast("Tensor | None", cast(nn.Module, find(text.model, path)).bias)
            layers[path] = StraightThroughLinear(latent.numbers, pair, latent.grid, bias, products=products)
            replace(text.model, path, layers[path])
            solved[path] = dataclasses.replace(solved[path], latent=None)
            del latent
    parameters = {f"{path}.{leaf}": layer.get_parameter(leaf) for path, layer in layers.items() for leaf in ("A", "B")}
    optimizer = Optimizer(parameters, dataclasses.replace(spec, weight_decay=0.0))
    rate = RATE * (spec.learning_rate or learning_rate_of(text))
    order, warmup = order_of(rows, spec), schedule.warmup_steps(steps, WARMUP)
    for step in range(steps):
        batches = text.micro_batches([rows[row] for row in order.indices(step)], spec.micro_tokens)
        targets, total = sum(batch.targets for batch in batches), 0.0
        for batch in batches:
            loss, _ = text_loss(text, batch.to(text.device), chunk=spec.head_chunk)
            (loss / targets).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimizer.step(rate * schedule.factor(step + 1, steps, warmup=warmup, shape="linear"))
        for layer in layers.values():
            layer.round()
        on_step(step + 1, total / targets)
    bases = {path: layer.packed() for path, layer in layers.items()}
    for path, base in bases.items():
        replace(text.model, path, PackedLinear(base, layers[path].bias))
    return bases
