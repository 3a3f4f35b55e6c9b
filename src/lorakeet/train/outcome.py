"""How a run ended: what the loop returns, and reports tell; what one leaves that ends too early."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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


def kept_text(checkpoint: Path | None, adapter: Path, loss: float | None, step: int | None) -> str:
    """What is left of a run: its newest checkpoint, and the best adapter with its held-out loss, where there are any."""
    kept = [f"the checkpoint {checkpoint}"] if checkpoint else []
    if loss is not None:
        kept.append(f"{adapter} (held-out loss {loss:.4f} at step {step})")
    return f"Kept: {' and '.join(kept)}." if kept else "No checkpoint was written before."
