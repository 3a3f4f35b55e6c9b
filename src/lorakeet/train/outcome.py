"""How a run ended: what the loop returns, and reports tell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How a run ended. The task's parameters then hold what RUN/adapter holds: the best adapter."""

    steps: int
    planned_steps: int
    reason: str  # "all steps done", or why it ended earlier
    base_loss: float | None  # held-out, at step 0
    best_loss: float | None
    best_step: int | None
    learning_rate: float
    tokens: int
    seconds: float
    peak_bytes: int  # of the process; of its CUDA device where a budget bounds that
    skipped_steps: int = 0  # of `steps`
    loss_scale: float | None = None  # at the end; None where the loss is not scaled
