"""What the loop asks of the thing it trains. Text answers in train/text/task; images can answer without a change to the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from lorakeet.evaluate import intervals
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.train.processes import Processes
from lorakeet.train.pruning import Pruning

RESAMPLES = 1000  # behind the interval of each held-out loss on the way; the report uses more
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

    def mean(self, *, seed: int) -> Estimate:
        """The loss a target, with its interval over rows."""
        return intervals.ratio(self.sums, self.weights, spec=EvaluateSpec(resamples=RESAMPLES, seed=seed))


def gradients_by_batch(loss: Callable[[BatchT], Tensor], batches: Sequence[BatchT], targets: float) -> Tensor:
    """Forward and backward of each micro-batch in turn. `loss` gives the sum of the loss over a batch's targets, with gradient.

    Each micro-batch draws its random numbers (dropout) from a seed of its own, drawn first: a task that computes the batches in
    another order draws the same ones.
    """
    total: Tensor | None = None
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    for batch, seed in zip(batches, batch_seeds(len(batches)), strict=True):
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            found = loss(batch)
            (found / targets).backward()  # type: ignore[no-untyped-call]
        own = found.detach().double()
        total = own if total is None else total + own
        del found  # with its graph, which nothing that is recorded next may meet (models/text/cuda_graphs)
    return torch.zeros((), dtype=torch.float64) if total is None else total


def batch_seeds(count: int) -> list[int]:
    """A seed for each micro-batch of a step, drawn from torch's generator."""
    return [int(seed) for seed in torch.randint(2**62, (count,))]


class Task(Protocol[BatchT]):
    """A model with one adapter in training, its rows and its loss.

    Where several `processes` train together, each sees its own part of the rows of a step, and the loop adds up.
    """

    processes: Processes
    pruning: Pruning | None  # where ranks fall in training

    @property
    def dtype(self) -> torch.dtype:
        """That of activations and of their gradients."""
        ...

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
        """This process's micro-batches of step `step`, counted from 0: a function of the step alone, so that resuming is easy."""
        ...

    def size(self, batch: BatchT) -> Size: ...

    def gradients(self, batches: Sequence[BatchT], targets: float) -> Tensor:
        """Adds ∂(Σ losses / targets) to the gradients of the parameters, micro-batch after micro-batch; Σ losses, fp64, detached.

        `targets` is how many the step has, over the loss scale where there is one (train/loss_scale). `batches` are those of one
        step that have targets. `gradients_by_batch` is the usual way.
        """
        ...

    def held_out(self) -> HeldOut | None:
        """The loss of every held-out row as the adapter is now, the same in every process; None where no rows were held out.

        Draws no random numbers.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes the adapter as it is now into the empty `folder`, with all that is needed to open it again."""
        ...
