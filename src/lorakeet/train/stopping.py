"""Which adapter is the best one, and when to stop: decided by held-out loss alone."""

from __future__ import annotations

from dataclasses import dataclass

DIVERGED = 10.0  # nats a token above the base: e^10, the rows have become 22,000 times less likely a token


@dataclass
class EarlyStopping:
    """What held-out evaluations have shown so far; plain numbers, saved with every checkpoint.

    The evaluation at step 0 is the base's own loss: a comparison, not a candidate.
    """

    base_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    reference: float | None = None  # the loss that the next one must beat by `min_improvement`
    stale: int = 0  # evaluations since then

    def see(self, step: int, loss: float, *, min_improvement: float) -> bool:
        """Takes in the loss at `step`; whether it is the best so far, so that its adapter must be kept."""
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

    def diverged(self, loss: float) -> bool:
        """Whether `loss` is so far above the base's that no later step will mend it."""
        return self.base_loss is not None and loss > self.base_loss + DIVERGED

    def exhausted(self, patience: int) -> bool:
        """Whether `patience` evaluations in a row brought no improvement; never with a patience of 0."""
        return patience > 0 and self.stale >= patience
