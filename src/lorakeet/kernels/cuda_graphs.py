"""Both passes of a small text model as CUDA graphs (models/text/cuda_graphs): where a run tries that by itself.

A host takes some 5 µs to launch one of torch's operations and 11 for a fused one. By counting (benchmarks/launches.py) that is
longer than a GPU computes for models of less than 1B, and for larger ones with few tokens at once. Beyond `LARGEST` it computes
for several times as long. **Not run on a GPU yet**, so a run compares its graphs with the model before it uses them.
"""

from __future__ import annotations

import torch

from lorakeet.kernels import flash_varlen
from lorakeet.kernels.protocol import Situation

LARGEST = 3_500_000_000  # weights: of models that are called 3B
NEEDS = "up to 3.5 billion weights; planned, and proved on the run's first micro-batches"


def why_not(situation: Situation) -> str:
    """Why passes are not recorded in a situation."""
    if situation.device.type != "cuda":
        return "it is for NVIDIA GPUs"
    if torch.version.hip:
        return "this torch is built for ROCm"
    why = flash_varlen.why_not(situation)
    return f"row offsets that lie on the GPU need torch's flash kernel: {why}" if why else ""


def takes(weights: int) -> bool:
    """So many weights in the frozen model."""
    return weights <= LARGEST
