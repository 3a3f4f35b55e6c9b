"""The loss scale of float16 training (smallest number 6e-8, largest 65,504).

Gradients of activations are often smaller than that and would become 0. So the loss is multiplied by a scale before backward,
and the fp32 gradients are divided by it (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).
The scale is a power of two, so both are exact. A step that overflows is skipped and halves the scale; GROWTH steps without
overflow double it. torch's GradScaler does the same on the device, without reporting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

START = 2.0**16
GROWTH = 2000  # steps in a row without overflow


@dataclass
class LossScale:
    """The scale and its history, saved with every checkpoint. Always 1 unless `dynamic`."""

    value: float = 1.0
    dynamic: bool = False
    good: int = 0  # steps since it last changed
    skipped: int = 0  # steps skipped

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale:
        """The initial scale for activations in `dtype`."""
        return cls(START, dynamic=True) if dtype == torch.float16 else cls()

    def unscale(self, parameters: Mapping[str, Tensor]) -> None:
        """Divides the gradients by the scale."""
        for parameter in parameters.values() if self.dynamic else ():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.value)

    def record_step(self) -> None:
        """Records a step."""
        self.good += 1
        if self.dynamic and self.good == GROWTH:
            self.value, self.good = 2 * self.value, 0

    def overflowed(self) -> bool:
        """Records a skipped step and halves the scale. Returns false if it falls below 1, where float16 is of no use."""
        self.value, self.good, self.skipped = self.value / 2, 0, self.skipped + 1
        return self.value >= 1

    def record(self) -> dict[str, float]:
        """The entries for metrics.jsonl."""
        return {"loss_scale": self.value, "skipped_steps": self.skipped} if self.dynamic else {}
