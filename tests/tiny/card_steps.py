"""Steps of training on the simulated card: a model of tiny numbers, rows that share a beginning, and what each step counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.planning.rehearse_text import silent_training
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.loop import Training
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.task import TextTask
from tiny.simulated_card import Card, Wait

LORA = LoraSpec(rank=4, alpha=12.0)
SPEC = TrainSpec(steps=8, batch_size=6, micro_tokens=60, learning_rate=1e-3)
BEGINNING = 12  # tokens that all rows begin with


def rows_behind(beginning: int, count: int, *, longest: int = 30) -> list[Example]:
    """Rows of other lengths and tokens behind so many common ones; the second half of each is a target."""
    draw = np.random.default_rng(beginning)
    found = []
    for number in range(count):
        length = beginning + 8 + number % (longest - beginning - 8)
        ids = np.concatenate([np.arange(4, 4 + beginning), draw.integers(4, 60, size=length - beginning)])
        found.append(Example(ids, np.arange(length) >= length // 2, str(number), None, False))
    return found


def training_on_card(
    folder: Path,
    rows: Sequence[Example],
    *,
    dtype: str = "bfloat16",
    quantize: str = "none",
    attention: str = "auto",
    int8_products: bool = False,
    lora: LoraSpec = LORA,
    spec: TrainSpec = SPEC,
    **residence: Any,
) -> Training[Any]:
    """A Training of the model in `folder` on the card, ready to `step`; `residence` is for load_text_model."""
    packed = QuantSpec(method=quantize, int8_products=int8_products)
    given = ModelSpec(path=str(folder), dtype=dtype, device="cuda", quantize=packed, attention=attention)
    text = load_text_model(given, **residence)
    initialise_adapter(text, plan_for(text.model, lora, text.family), seed=0)
    return silent_training(TextTask(text, list(rows), held_out=(), spec=replace(spec)), spec)


def stepped(training: Training[Any], card: Card, steps: int = 3) -> tuple[list[Wait], list[Wait], int]:
    """What the host waited for in the last of so many steps: within its micro-batches, in all, and how many these were."""
    within: list[Wait] = []
    count = 0
    gradients = training.task.gradients

    def watched(batches: Any, targets: float) -> Any:
        nonlocal count
        before, count = len(card.waits), len(batches)
        found = gradients(batches, targets)
        within.extend(card.waits[before:])
        return found

    training.task.gradients = watched
    for _ in range(steps):
        card.reset()
        within.clear()
        training.step()
    return within, list(card.waits), count
