"""The loss scale of training in float16, whose smallest number is 6e-8 and whose largest is 65,504.

Gradients of activations are often smaller than that and would become 0. So the loss is multiplied by a scale before it is
differentiated and the gradients, fp32 by then, are divided by it (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).
The scale is a power of two, so both are exact. Where a step overflows, it is left out and the scale halved; after GROWTH steps
without, it is doubled. torch's GradScaler does the same with tensors on the device, of which it says nothing in words.
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
    """The scale and what it went through; plain numbers, saved with every checkpoint. 1 for good unless it is `dynamic`."""

    value: float = 1.0
    dynamic: bool = False
    good: int = 0  # steps since it last changed
    skipped: int = 0  # steps left out

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale:
        """That of a run whose activations are in `dtype`, at its beginning."""
        return cls(START, dynamic=True) if dtype == torch.float16 else cls()

    def take_off(self, parameters: Mapping[str, Tensor]) -> None:
        """Divides the gradients by the scale."""
        for parameter in parameters.values() if self.dynamic else ():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.value)

    def went_well(self) -> None:
        """A step was taken."""
        self.good += 1
        if self.dynamic and self.good == GROWTH:
            self.value, self.good = 2 * self.value, 0

    def overflowed(self) -> bool:
        """A step was left out: the scale is halved. Whether one of 1 or more is left, below which float16 is no use."""
        self.value, self.good, self.skipped = self.value / 2, 0, self.skipped + 1
        return self.value >= 1

    def record(self) -> dict[str, float]:
        """What metrics.jsonl says of it at each step."""
        return {"loss_scale": self.value, "skipped_steps": self.skipped} if self.dynamic else {}
