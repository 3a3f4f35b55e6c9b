"""The same with the decoder's forward and backward pass as CUDA graphs (train.cuda_graphs)."""

from __future__ import annotations

from functools import partial

from harness.steps import contender

from contenders.packed_lorakeet import train_packed

if __name__ == "__main__":
    contender(partial(train_packed, recorded=True))
