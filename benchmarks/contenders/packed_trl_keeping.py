"""The same without gradient checkpointing: more memory, nothing computed twice."""

from __future__ import annotations

from functools import partial

from harness.steps import contender

from contenders.packed_trl import train_trl

if __name__ == "__main__":
    contender(partial(train_trl, recomputing=False))
