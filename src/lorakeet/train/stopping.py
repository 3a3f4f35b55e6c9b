"""Early stopping: the best adapter, and when to stop, by held-out loss alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

DIVERGED = 10.0  # nats per token above the base: each token e^10 = 22,000 times less likely
FACTOR = 2.0  # for losses of another unit: so many times the loss at the start, plus DIVERGED


@dataclass
class EarlyStopping:
    """The held-out losses so far, saved with every checkpoint.

    The evaluation at step 0 is the base's loss: a reference, not a candidate.
    """

    base_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    reference: float | None = None  # the loss to beat by `min_improvement`
    stale: int = 0  # evaluations since `reference`

    def see(self, step: int, loss: float, *, min_improvement: float) -> bool:
        """Records the loss at `step`. Returns true if it is the best so far, so that its adapter must be kept."""
        if step == 0:
            self.base_loss = loss
            return False
        if self.reference is None or loss < self.reference - min_improvement:
            self.reference, self.stale = loss, 0
        else:
            self.stale += 1
        if self.best_loss is not None and not loss < self.best_loss:
            return False
        self.best_loss, self.best_step = loss, step
        return True

    def diverged(self, loss: float, *, nats: bool = True) -> bool:
        """True if `loss` is beyond recovery above the base's; in another unit than `nats` a token also if it is not finite."""
        if self.base_loss is None or nats:
            return self.base_loss is not None and loss > self.base_loss + DIVERGED
        return not math.isfinite(loss) or loss > FACTOR * self.base_loss + DIVERGED

    def exhausted(self, patience: int) -> bool:
        """True after `patience` evaluations in a row without improvement; never with a patience of 0."""
        return patience > 0 and self.stale >= patience
