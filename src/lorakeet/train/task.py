"""The interface between the training loop and a task; implemented by train/text/task and by each kind of run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

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
from lorakeet.train.rng import current_cuda_devices

RESAMPLES = 1000  # for intervals of held-out losses during training; the report uses more
BatchT = TypeVar("BatchT")
KeptTerms = Mapping[str, tuple[int, int]]  # by parameter, the dimension of its rank and how many of the first terms never change
NONE_KEPT: KeptTerms = MappingProxyType({})


@dataclass(frozen=True)
class Size:
    """The size of a batch and its weight in the loss."""

    rows: int
    tokens: int  # computed
    targets: int  # supervised: the weight of the batch in the loss


@dataclass(frozen=True)
class HeldOut:
    """The loss of each held-out row: its sum over the row's targets, and their number. `more` are other numbers by name."""

    sums: NDArray[np.float64]  # (rows,)
    weights: NDArray[np.float64]  # (rows,)
    more: Mapping[str, float] = field(default_factory=dict)

    def mean(self, *, seed: int) -> Estimate:
        """The loss per target, with its interval over rows."""
        return intervals.ratio(self.sums, self.weights, spec=EvaluateSpec(resamples=RESAMPLES, seed=seed))


def gradients_by_batch(loss: Callable[[BatchT], Tensor], batches: Sequence[BatchT], targets: float) -> Tensor:
    """Runs forward and backward of one micro-batch after another; `loss` is the sum over a batch's targets, with gradient.

    Each micro-batch has its own seed for random numbers (dropout), drawn first, so that they do not depend on the order of
    computation.
    """
    total: Tensor | None = None
    for batch, seed in zip(batches, batch_seeds(len(batches)), strict=True):
        with torch.random.fork_rng(devices=current_cuda_devices()):
            torch.manual_seed(seed)
            found = loss(batch)
            (found / targets).backward()  # type: ignore[no-untyped-call]
        own = found.detach().double()
        total = own if total is None else total + own
        del found  # and its autograd graph
    return torch.zeros((), dtype=torch.float64) if total is None else total


def batch_seeds(count: int) -> list[int]:
    """A seed for each micro-batch of a step, drawn from torch's generator."""
    return [int(seed) for seed in torch.randint(2**62, (count,))]


class Task(Protocol[BatchT]):
    """A model with one adapter in training, its rows and its loss.

    With several `processes`, each has its part of the rows of a step, and the loop sums up.
    """

    processes: Processes
    pruning: Pruning | None  # rank pruning during training
    kept_terms: KeptTerms  # of an earlier adapter below the trained one

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and of their gradients."""
        ...

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def held_out_rows(self) -> Sequence[Any]:
        """The rows of `held_out`."""
        ...

    @property
    def learning_rate(self) -> float:
        """The default learning rate."""
        ...

    def parameters(self) -> dict[str, Parameter]:
        """The trained parameters, fp32, in a stable order; A and B of a pair are named PATH.A and PATH.B."""
        ...

    def fixed(self) -> dict[str, Tensor]:
        """The untrained state of the adapter (the initial values of a PiSSA pair)."""
        ...

    def batches(self, step: int) -> Sequence[BatchT]:
        """This process's micro-batches of step `step`, counted from 0: a function of the step alone."""
        ...

    def size(self, batch: BatchT) -> Size: ...

    def gradients(self, batches: Sequence[BatchT], targets: float) -> Tensor:
        """Adds ∂(Σ losses / targets) to the gradients of the parameters, micro-batch after micro-batch; Σ losses, fp64, detached.

        `targets` is the number of targets of the step, divided by the loss scale (train/loss_scale). `batches` are those of one
        step that have targets. Most tasks use `gradients_by_batch`.
        """
        ...

    def held_out(self) -> HeldOut | None:
        """The loss of every held-out row with the current adapter, equal in every process; None without held-out rows.

        Draws no random numbers.
        """
        ...

    def halve(self) -> str:
        """Makes micro-batches half as large from now on and says what they are; empty, and nothing changes, if they cannot be."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the current adapter into the empty `folder`, with everything needed to open it again."""
        ...
