"""Learning-rate schedules: pure functions from the step to a factor of the peak rate, without state."""

from __future__ import annotations

import math


def warmup_steps(total: int, fraction: float) -> int:
    """Warm-up steps: the fraction of `total`, rounded up, at most total − 1."""
    return min(math.ceil(fraction * total), total - 1)


def factor(step: int, total: int, *, warmup: int, shape: str) -> float:
    """The factor at `step` (1 to `total`): never 0, so that the first and last steps train too.

    Rises as step / warmup up to 1. Then, with r = done share of the remaining steps (0 at the first):
    linear 1 − r, cosine (1 + cos πr) / 2, constant 1.
    """
    if step <= warmup:
        return step / warmup
    done = (step - warmup - 1) / (total - warmup)
    if shape == "linear":
        return 1 - done
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
