"""The settings of training, and the two rules that fill in what is left out. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

EVALUATIONS_A_RUN = 10  # when `evaluate_every` is left out
LARGEST_SEED = 2**63 - 1  # what torch takes


@dataclass(frozen=True)
class TrainSpec:
    """How long, how fast and how watched a run is; `validate` says everything that is wrong."""

    epochs: float = field(default=3.0, metadata={"help": "Passes over the training rows; parts of a pass are allowed."})
    steps: int | None = field(default=None, metadata={"help": "Optimizer steps; where given, it wins over epochs."})
    batch_size: int = field(default=16, metadata={"help": "Rows in one optimizer step."})
    micro_tokens: int = field(
        default=2048, metadata={"help": "Tokens that are computed at once; the rows of a step are cut into such parts."}
    )
    length_grouping: bool = field(default=True, metadata={"help": "Put rows of similar length into the same step."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Highest learning rate; left out, it follows from the model's hidden size."}
    )
    rate_trial_steps: int = field(
        default=12,
        metadata={"help": "Steps in which a run without learning_rate tries half, once and twice the rule's; below 8: none."},
    )
    b_learning_rate_ratio: float = field(
        default=1.0, metadata={"help": "Learning rate of B over that of everything else; LoRA+ uses 16 (arXiv 2402.12354)."}
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "Share of each weight taken off per step and unit of learning rate."}
    )
    beta1: float = field(default=0.9, metadata={"help": "How much of the running mean of gradients is kept at each step."})
    beta2: float = field(
        default=0.999, metadata={"help": "How much of the running mean of squared gradients is kept at each step."}
    )
    epsilon: float = field(
        default=1e-8, metadata={"help": "Added to the root of the mean square, so that it never divides by zero."}
    )
    moments: Literal["float32", "8bit"] = field(
        default="float32",
        metadata={"help": "How the optimizer's two running means are kept; 8bit takes a quarter of that (arXiv 2110.02861)."},
    )
    schedule: Literal["linear", "cosine", "constant"] = field(
        default="linear", metadata={"help": "How the learning rate goes down after the warm-up."}
    )
    warmup_fraction: float = field(
        default=0.03, metadata={"help": "Share of the steps in which the learning rate rises to its height."}
    )
    clip_norm: float = field(
        default=1.0, metadata={"help": "Largest norm of the whole gradient; longer ones are shortened. 0 is off."}
    )
    head_chunk: int = field(default=256, metadata={"help": "Supervised tokens that go through the output head at once."})
    keep_prefix_states: bool = field(
        default=False,
        metadata={
            "help": "Compute what blocks below the lowest adapted one make of a row once, for all epochs and all trials of tune; "
            "on disk."
        },
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Record a micro-batch's passes as CUDA graphs, for models so small that a card waits for the host; not run "
            "on a card yet."
        },
    )
    shard: bool = field(
        default=False,
        metadata={"help": "Part the frozen blocks over the processes of torchrun (FSDP2), which else hold the whole base each."},
    )
    evaluate_every: int | None = field(
        default=None, metadata={"help": "Steps between held-out evaluations; left out, ten a run and at least one a pass."}
    )
    patience: int = field(
        default=5,
        metadata={"help": "Stop after this many held-out evaluations in a row without improvement; 0 never stops early."},
    )
    min_improvement: float = field(
        default=0.0,
        metadata={"help": "By how much held-out loss (text: nats a token) must fall to count as an improvement for patience."},
    )
    checkpoint_every: int | None = field(
        default=None, metadata={"help": "Steps between checkpoints; left out, one with every held-out evaluation."}
    )
    keep_checkpoints: int = field(
        default=2, metadata={"help": "Newest checkpoints kept; the best adapter is always kept besides."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the adapter's start, of the order of the rows and of dropout."})
    log_to: Literal["none", "tensorboard", "wandb"] = field(
        default="none", metadata={"help": "Where the numbers go besides metrics.jsonl."}
    )

    def validate(self) -> list[str]:
        """Every problem of these settings in words; empty when they can be used."""
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

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run: `steps`, or else epochs × steps of one pass, rounded up."""
        return self.steps if self.steps is not None else max(1, math.ceil(self.epochs * steps_per_epoch - 1e-9))

    def evaluation_interval(self, steps_per_epoch: int) -> int:
        """Steps between held-out evaluations."""
        if self.evaluate_every is not None:
            return self.evaluate_every
        return max(1, min(math.ceil(self.total_steps(steps_per_epoch) / EVALUATIONS_A_RUN), steps_per_epoch))

    def checkpoint_interval(self, steps_per_epoch: int) -> int:
        """Steps between checkpoints."""
        return self.checkpoint_every if self.checkpoint_every is not None else self.evaluation_interval(steps_per_epoch)


def _finite(value: float, low: float) -> bool:
    return math.isfinite(value) and value >= low


def learning_rate_for(hidden: int, exponent: float) -> float:
    """5e-5 · 10 · (2000 / hidden)^exponent: the rate for LoRA by the model's hidden size.

    From the sweeps published with "LoRA Without Regret" (Thinking Machines Lab, 2025): LoRA wants ten times the rate of full
    fine-tuning, and wider models want less; the exponent is a property of the family (0.781 for Llama-like models).
    """
    return float(5e-5 * 10 * (2000 / hidden) ** exponent)
