"""The stages of the first hour on a GPU, in order: what each is for, its module and how long it may take. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage; `module` is one of this package with a function `run(found)`."""

    key: str
    module: str
    seconds: int
    title: str


STAGES = (
    Stage("a", "rates", 60, "The machine: versions, product rate, copies, launches"),
    Stage("b", "proofs", 180, "Attention against its definition, and the tests of kernels"),
    Stage("c", "losses", 240, "Losses of the same steps on the CPU and on the GPU"),
    Stage("d", "speed", 600, "Tokens a second, memory and host time, beside other programs"),
    Stage("e", "waits", 120, "Where the host waits for the GPU"),
    Stage("f", "kernels", 180, "The 25 kernels that take longest, and how long the GPU is idle"),
    Stage("g", "runs", 540, "Whole runs: in 8, 12 and 24 GB, and streamed"),
    Stage("h", "shards", 120, "A base sharded over two processes"),
    Stage("i", "images", 180, "Stable Diffusion 1.5 and SDXL at batch 1"),
)
