"""The protocol between loop and task: its parts, and that the tasks of this project keep the promise on which resuming rests."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lorakeet.data.pack import Batch
from lorakeet.train.spec import TrainSpec
from lorakeet.train.task import HeldOut, Size, Task
from train.tiny_task import TinyTask


def test_the_parts_are_plain_frozen_values() -> None:
    size = Size(rows=2, tokens=9, targets=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        size.rows = 3  # type: ignore[misc]
    held_out = HeldOut(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    assert held_out.sums.sum() / held_out.weights.sum() == 2.0


def test_batches_are_a_function_of_the_step_alone() -> None:
    """Asked in another order, twice, and with other random numbers about, a step has the same rows."""
    spec = TrainSpec(batch_size=8, micro_tokens=48)
    task: Task[Batch] = TinyTask(spec)
    forwards = [[batch.keys for batch in task.batches(step)] for step in range(15)]
    torch.manual_seed(5)
    np.random.seed(5)
    other: Task[Batch] = TinyTask(spec)
    for step in reversed(range(15)):
        assert [batch.keys for batch in other.batches(step)] == forwards[step]
    assert forwards[0] != forwards[task.steps_per_epoch]  # every epoch has an order of its own
