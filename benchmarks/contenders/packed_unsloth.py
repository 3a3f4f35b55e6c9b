"""unsloth on packed rows, as its documentation has it; runs in an environment of its own, where Lorakeet is not installed."""

from __future__ import annotations

from contenders.with_unsloth import trained  # isort: skip  (unsloth asks to be imported before all others)
from harness.steps import StepLog, contender
from harness.trainer import UNCUT, tokenised
from harness.workload import Workload


def train_packed(workload: Workload, dtype: str) -> StepLog:
    """The workload's steps in bf16 or NF4, "unsloth" checkpointing."""
    return trained(workload, tokenised(workload), longest=workload.micro_tokens, more={**UNCUT, "bf16": True})


if __name__ == "__main__":
    contender(train_packed)
