"""The model that a plan rehearses: made on shapes as a run makes it, with all of its blocks or a few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorakeet.memory.store import CPU
from lorakeet.models.recomputed import recompute_blocks
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.from_config import model_from_config, streamed_model_from_config
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.repeated_blocks import ModelBuilder
from lorakeet.planning.rehearsal_key import model_key
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.residency import Way


@dataclass(frozen=True)
class Precision:
    """How the weights are kept and multiplied."""

    dtype: torch.dtype
    products: torch.dtype
    quantize: QuantSpec
    device: torch.device = CPU

    @property
    def on_gpu(self) -> bool:
        """Whether on a CUDA device, whose memory is then what is forecast."""
        return self.device.type == "cuda"


def builder_of(spec: ModelSpec, way: Way, model_config: Any, precision: Precision, files: Path | None) -> ModelBuilder:
    """Makes the model of `spec` on shapes, with all of its blocks or a few, in memory or streamed as `way` says."""
    make: Callable[..., TextModel] = model_from_config
    if way.streamed:
        make = partial(streamed_model_from_config, residence=way.residence)
    elif way.recomputed:
        make = partial(_recomputed_from_config, keep=way.slots)
    settings: dict[str, Any] = {"products": precision.products, "attention": spec.attention, "quantize": precision.quantize}
    make = partial(make, name=spec.path, dtype=precision.dtype, files=files, **settings)
    return ModelBuilder(make, model_config, partial(model_key, spec, model_config, files, way, precision))


def _recomputed_from_config(config: Any, *, keep: int, **settings: Any) -> TextModel:
    """The model in memory, all of whose blocks but the last `keep` are computed again in the backward pass."""
    text = model_from_config(config, **settings)
    recompute_blocks(text.model, text.family, keep=keep)
    return text
