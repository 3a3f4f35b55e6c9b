"""The same with Lorakeet's Triton kernels (model.kernels: triton)."""

from __future__ import annotations

from functools import partial

from harness.steps import contender

from contenders.packed_lorakeet import train_packed

if __name__ == "__main__":
    contender(partial(train_packed, kernels="triton"))
