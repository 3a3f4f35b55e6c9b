"""The line of CUDA graphs in the table of kernels: for which models, in which situations."""

from __future__ import annotations

import pytest
import torch

from lorakeet.kernels import choose, flash_varlen
from lorakeet.kernels.choose import PASSES, passed_over, records_passes
from lorakeet.kernels.cuda_graphs import LARGEST
from lorakeet.kernels.protocol import Situation

CUDA = torch.device("cuda", 0)


def reason(device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16) -> str:
    return "".join(why for _, why in passed_over(PASSES, Situation(device, dtype, dtype))[1])


def test_on_nvidia_gpus_in_half_precision_up_to_3b() -> None:
    assert records_passes(CUDA, torch.bfloat16, 1_235_814_400) and records_passes(CUDA, torch.float16, 3_212_749_824)
    assert records_passes(CUDA, torch.bfloat16, LARGEST) and not records_passes(CUDA, torch.bfloat16, LARGEST + 1)
    assert not records_passes(CUDA, torch.float32, 1) and not records_passes(torch.device("cpu"), torch.bfloat16, 1)


def test_why_not_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not reason()
    assert reason(torch.device("cpu")) == "it is for NVIDIA GPUs"
    needs = "row offsets that lie on the GPU need torch's flash kernel: "
    assert reason(dtype=torch.float32) == f"{needs}takes bfloat16 and float16; states are float32"
    monkeypatch.setattr(flash_varlen, "DTYPES", ())
    assert reason().startswith(needs)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert reason() == "this torch is built for ROCm"
    monkeypatch.setattr(choose, "CANDIDATES", {})
    assert not records_passes(CUDA, torch.bfloat16, 1)
