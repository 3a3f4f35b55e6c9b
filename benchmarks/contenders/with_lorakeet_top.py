"""Lorakeet with adapters in the top 8 layers alone: the frozen prefix. It trains fewer parameters, and so another function."""

from __future__ import annotations

from harness.steps import StepLog, contender
from harness.workload import Workload

from contenders.with_lorakeet import train_lorakeet

LAYERS = "top:8"


def train_top(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps with `lora.layers` top:8, and with `train.keep_prefix_states` where rows come again."""
    return train_lorakeet(workload, dtype, layers=LAYERS)


if __name__ == "__main__":
    contender(train_top)
