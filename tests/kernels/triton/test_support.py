"""Where Triton kernels run, and the message where they do not."""

from __future__ import annotations

import sys

import pytest
import torch

from lorakeet.kernels.triton import support
from lorakeet.kernels.triton.support import why_not_on


def test_where_they_cannot_run_one_message_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "has_triton", lambda: False)
    assert "this model is on 'cpu'. Set model.kernels to torch" in why_not_on(torch.device("cpu"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert "pip install triton" in why_not_on(torch.device("cuda", 0))
    monkeypatch.setattr(sys, "platform", "win32")
    assert why_not_on(torch.device("cuda", 0)) == "Triton is there for Linux only. Set model.kernels to torch."


def test_gpus_that_the_kernels_were_not_compiled_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "has_triton", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    gpus = {97: (7, 5), 98: (8, 0), 99: (9, 0)}  # numbers that no GPU of this machine has
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    said = [why_not_on(torch.device("cuda", index)) for index in gpus]
    assert said[0].startswith("Triton kernels need an NVIDIA GPU of compute capability 8.0 or higher; this GPU has 7.5. ")
    assert said[1:] == ["", ""]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 97)
    assert why_not_on(torch.device("cuda")) == said[0]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "8.0 or higher; this torch is for AMD GPUs (ROCm 6.4). Set model.kernels" in why_not_on(torch.device("cuda", 1))
