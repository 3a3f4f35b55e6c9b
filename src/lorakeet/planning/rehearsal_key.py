"""All that a rehearsal of a run on text depends on, so that one that was made before is found again (memory/remembered)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakeet.config import RunConfig
from lorakeet.memory.remembered import state_of
from lorakeet.models.spec import ModelSpec
from lorakeet.train.spec import TrainSpec

NO_SHAPES = (
    "epochs", "steps", "batch_size", "micro_tokens", "length_grouping", "learning_rate", "rate_trial_steps", "schedule",
    "warmup_fraction", "evaluate_every", "patience", "min_improvement", "checkpoint_every", "keep_checkpoints", "seed", "log_to",
)  # fmt: skip  # settings of training that change no shape of a rehearsed step, which has rows of its own


def rehearsal_key(config: RunConfig, model_config: Any, files: Path | None, *more: object) -> tuple[object, ...]:
    """The parts of a key: the model of `model_config` and `files` as `config` takes it, the settings of training, and `more`."""
    return "rehearsal", *model_key(config.model, model_config, files), rehearsed_settings(config.train), *more


def model_key(spec: ModelSpec, model_config: Any, files: Path | None, *more: object) -> tuple[object, ...]:
    """The parts of a key: the model of `model_config` and `files` as `spec` takes it, and `more`."""
    outline = f"{type(model_config).__qualname__} {model_config.to_json_string(use_diff=False)}"
    return "model", outline, spec.path, spec.attention, state_of(files), *more


def rehearsed_settings(spec: TrainSpec) -> TrainSpec:
    """`spec` with the default of every setting that changes no shape of a rehearsed step."""
    default = TrainSpec()
    return replace(spec, **{name: getattr(default, name) for name in NO_SHAPES})
