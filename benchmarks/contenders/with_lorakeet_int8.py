"""Lorakeet over frozen weights in int8 that are multiplied in int8: fewer bytes, and other rounding than the rest."""

from __future__ import annotations

from harness.steps import StepLog, contender
from harness.workload import Workload

from contenders.with_lorakeet import train_lorakeet


def train_int8(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps with `model.quantize.int8_products`."""
    return train_lorakeet(workload, dtype, in_int8=True)


if __name__ == "__main__":
    contender(train_int8)
