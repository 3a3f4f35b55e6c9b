"""Fixtures of tests that need a CUDA device. LORAKEET_GPU_TESTS=cpu runs those that can on the CPU, to try them out."""

from __future__ import annotations

import os

import pytest
import torch

ON_CPU = os.environ.get("LORAKEET_GPU_TESTS") == "cpu"


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The CUDA device; the CPU stands for it where the tests are only tried out."""
    return torch.device("cpu") if ON_CPU else torch.device("cuda", 0)


@pytest.fixture
def real_gpu(gpu: torch.device) -> torch.device:
    """The same, for what no CPU can stand for."""
    if gpu.type != "cuda":
        pytest.skip("needs a real CUDA device")
    return gpu


@pytest.fixture
def narrow(gpu: torch.device) -> torch.dtype:
    """The 16-bit dtype of text on the GPU."""
    return torch.bfloat16 if gpu.type == "cpu" or torch.cuda.is_bf16_supported(False) else torch.float16
