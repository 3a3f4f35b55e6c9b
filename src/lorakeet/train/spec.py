"""`TrainSpec`, the `train` part of a run file, and rules for defaults. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

from lorakeet.registry import train_settings
from lorakeet.setting import Removed, setting
from lorakeet.settings import require_types

EVALUATIONS_A_RUN = 10  # when `evaluate_every` is left out
LARGEST_SEED = 2**63 - 1  # what torch takes


if TYPE_CHECKING:
    from lorakeet.registry import TrainedObjective as _Added
else:
    _Added = train_settings()
ADDED = tuple(one.name for one in fields(_Added))  # the settings that kinds add


@dataclass(frozen=True)
class TrainSpec(_Added):
    """Length, optimizer, evaluation and checkpoints of a run."""

    epochs: float = setting(3.0, "Passes over the training rows; fractions are allowed.")
    steps: int | None = setting(None, "Optimizer steps; overrides epochs.")
    batch_size: int = setting(16, "Rows per optimizer step.")
    micro_tokens: int = setting(2048, "Tokens per micro-batch; the rows of a step are split into micro-batches.")
    length_grouping: bool = setting(True, "Group rows of similar length into the same step.")
    learning_rate: float | None = setting(None, "Peak learning rate; by default it follows from the model's hidden size.")
    rate_trial_steps: int = setting(
        12, "Steps of a trial of half, once and twice the default learning rate, if none is given; below 8: no trial."
    )
    b_learning_rate_ratio: float = setting(
        1.0, "Learning rate of B relative to that of everything else; LoRA+ uses 16 (arXiv 2402.12354)."
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay, as in AdamW.")
    beta1: float = setting(0.9, "Decay rate of the optimizer's first moment, the running mean of gradients.")
    beta2: float = setting(0.999, "Decay rate of the optimizer's second moment, the running mean of squared gradients.")
    epsilon: float = setting(1e-8, "Added to the square root of the second moment to avoid division by zero.")
    moments: Literal["float32", "8bit"] = setting(
        "float32", "Dtype of the optimizer's two moments; 8bit takes a quarter of the memory (arXiv 2110.02861)."
    )
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "Learning rate schedule after the warm-up.")
    warmup_fraction: float = setting(0.03, "Share of the steps in which the learning rate warms up.")
    clip_norm: float = setting(1.0, "Largest norm of the gradient, beyond which it is clipped; 0 turns clipping off.")
    head_chunk: int = setting(256, "Target tokens per chunk of the output layer.")
    keep_prefix_states: bool = setting(
        False, "Cache the hidden states below the lowest adapted block on disk, for all epochs and all trials of tune."
    )
    shard: bool = setting(
        False, "Shard the frozen blocks over the processes of torchrun (FSDP2); if false, each process has the whole base."
    )
    evaluate_every: int | None = setting(
        None, "Steps between held-out evaluations; by default ten per run and at least one per epoch."
    )
    patience: int = setting(
        5, "Stop after this many held-out evaluations in a row without improvement; 0 turns early stopping off."
    )
    min_improvement: float = setting(
        0.0, "Smallest decrease of the held-out loss that counts for patience, in its unit (of answers: nats per token)."
    )
    checkpoint_every: int | None = setting(None, "Steps between checkpoints; by default one at every held-out evaluation.")
    keep_checkpoints: int = setting(2, "Number of latest checkpoints to keep; the best adapter is kept as well.")
    seed: int = setting(0, "Random seed of the adapter's initialisation, the order of the rows, and dropout.")
    log_to: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"] = setting(
        "none", "Where metrics go besides metrics.jsonl."
    )

    REMOVED: ClassVar[Mapping[str, Removed]] = {"cuda_graphs": Removed((None, False), "Passes are not recorded as CUDA graphs.")}

    def __post_init__(self) -> None:
        require_types(self)

    def validate(self) -> list[str]:
        """Returns a message for every wrong setting."""
        found: list[str] = []
        for name in (
            "batch_size",
            "micro_tokens",
            "head_chunk",
            "keep_checkpoints",
            "steps",
            "evaluate_every",
            "checkpoint_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"train.{name} is {value}; it must be 1 or more.")
        for name in ("patience", "seed", "weight_decay", "clip_norm", "min_improvement", "rate_trial_steps"):
            if not _finite(getattr(self, name), 0.0):
                found.append(f"train.{name} is {getattr(self, name):g}; it must be 0 or more.")
        if self.seed > LARGEST_SEED:
            found.append(f"train.seed is {self.seed}; it must be at most {LARGEST_SEED} (64 bits).")
        for name in ("epochs", "b_learning_rate_ratio", "epsilon"):
            value = getattr(self, name)
            if not _finite(value, 0.0) or value == 0:
                found.append(f"train.{name} is {value:g}; it must be above 0.")
        for name in ("beta1", "beta2", "warmup_fraction"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"train.{name} is {getattr(self, name):g}; it must be at least 0 and below 1.")
        rate = self.learning_rate
        if rate is not None and not (_finite(rate, 0.0) and 0 < rate <= 1):
            found.append(f"train.learning_rate is {rate:g}; expected above 0 and at most 1, such as 2e-4, or none to choose it.")
        return found

    @property
    def answers(self) -> int:
        """The answers of a row, with those that are only read."""
        return self.registered.answers

    @property
    def sequences(self) -> int:
        """The token sequences of a step: a row with each of its answers."""
        return self.batch_size * self.answers

    def total_steps(self, steps_per_epoch: int) -> int:
        """Returns the optimizer steps of the whole run: `steps`, or else epochs × `steps_per_epoch`, rounded up."""
        return self.steps if self.steps is not None else max(1, math.ceil(self.epochs * steps_per_epoch - 1e-9))

    def evaluation_interval(self, steps_per_epoch: int) -> int:
        """Returns the steps between held-out evaluations."""
        if self.evaluate_every is not None:
            return self.evaluate_every
        return max(1, min(math.ceil(self.total_steps(steps_per_epoch) / EVALUATIONS_A_RUN), steps_per_epoch))

    def checkpoint_interval(self, steps_per_epoch: int) -> int:
        """Returns the steps between checkpoints."""
        return self.checkpoint_every if self.checkpoint_every is not None else self.evaluation_interval(steps_per_epoch)


def _finite(value: float, low: float) -> bool:
    return math.isfinite(value) and value >= low


def learning_rate_for(hidden: int, exponent: float) -> float:
    """Returns LoRA's default learning rate for a hidden size: 5e-5 · 10 · (2000 / hidden)^exponent.

    From the sweeps published with "LoRA Without Regret" (Thinking Machines Lab, 2025): LoRA needs ten times the rate of full
    fine-tuning, and wider models need less; the exponent depends on the family (0.781 for Llama-like models).
    """
    return float(5e-5 * 10 * (2000 / hidden) ** exponent)
