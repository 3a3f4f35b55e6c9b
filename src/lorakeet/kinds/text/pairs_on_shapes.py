"""The pairs of a run on text, planned on the shapes of its model alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.memory.ledger import Ledger
from lorakeet.models.targets import plan_for
from lorakeet.models.text.from_config import config_of, local_files, model_from_config


def pairs_on_shapes(config: RunConfig, say: Callable[[str], None]) -> tuple[Plan, bool]:
    """The plan of the pairs, and whether the model's head shares the embedding's weight; allocates no weight."""
    model_config = config_of(config.model, say)
    with torch.random.fork_rng(devices=[]), Ledger():
        text = model_from_config(
            model_config, name=config.model.path, dtype=torch.float32, products=torch.float32, attention=config.model.attention,
            quantize=config.model.quantize, files=local_files(config.model.path),
        )  # fmt: skip
        return plan_for(text.model, config.lora, text.family), ties_head(model_config)


def ties_head(model_config: Any) -> bool:
    """Whether the head shares the embedding's weight."""
    return bool(getattr(model_config.get_text_config(), "tie_word_embeddings", False))
