"""Lorakeet without shared prefixes: every row computes its own."""

from __future__ import annotations

from harness.steps import StepLog, contender
from harness.workload import Workload

from contenders.with_lorakeet import train_lorakeet


def train_unshared(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps without the sharing, which no setting turns off."""
    return train_lorakeet(workload, dtype, shares_prefix=False)


if __name__ == "__main__":
    contender(train_unshared)
