"""What the loop asks of the thing it trains. Text answers in train/text_task; images can answer without a change to the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class Size:
    """How much work a batch is, and how much it counts."""

    rows: int
    tokens: int  # computed
    targets: int  # supervised: the weight of the batch in the loss


@dataclass(frozen=True)
class HeldOut:
    """The loss of each held-out row: its sum over the row's targets, and how many targets those are."""

    sums: NDArray[np.float64]  # (rows,)
    weights: NDArray[np.float64]  # (rows,)


class Task(Protocol[BatchT]):
    """A model with one adapter in training, its rows and its loss."""

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def learning_rate(self) -> float:
        """The rate to use where the settings name none."""
        ...

    def parameters(self) -> dict[str, Parameter]:
        """What is trained, fp32, in a stable order; A and B of a pair are named PATH.A and PATH.B."""
        ...

    def fixed(self) -> dict[str, Tensor]:
        """What belongs to the adapter's state but is not trained (the values at which a PiSSA pair began)."""
        ...

    def batches(self, step: int) -> Sequence[BatchT]:
        """The micro-batches of optimizer step `step`, counted from 0: a function of the step alone, so that resuming is easy."""
        ...

    def size(self, batch: BatchT) -> Size: ...

    def loss(self, batch: BatchT) -> Tensor:
        """The sum of the loss over the batch's targets, with gradient."""
        ...

    def held_out(self) -> HeldOut | None:
        """The loss of every held-out row as the adapter is now; None where no rows were held out. Draws no random numbers."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the adapter as it is now into the empty `folder`, with all that is needed to open it again."""
        ...
