"""Learning-rate schedules: pure functions from the step to a factor of the highest rate. Nothing to save, nothing to restore."""

from __future__ import annotations

import math


def warmup_steps(total: int, fraction: float) -> int:
    """Steps in which the rate rises: the fraction of `total`, rounded up, and at most all but one."""
    return min(math.ceil(fraction * total), total - 1)


def factor(step: int, total: int, *, warmup: int, shape: str) -> float:
    """The factor at `step` (1 to `total`): never 0, so that the first and the last step also learn.

    Rises as step / warmup up to 1. Then, with r = share of the remaining steps that are done (0 at the first of them):
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
