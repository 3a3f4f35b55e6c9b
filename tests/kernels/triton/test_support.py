"""Where Triton kernels run, and the message where they do not."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakeet.kernels import liger
from lorakeet.kernels.protocol import Situation
from lorakeet.kernels.triton import support
from lorakeet.kernels.triton.support import why_no_launcher, why_not_on
from lorakeet.models.kernels import missing_libraries
from lorakeet.quant.spec import QuantSpec

CUDA = torch.device("cuda", 0)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU beside all packages; what is found of a compiler is forgotten."""
    monkeypatch.setattr(support, "has_triton", lambda: True)
    monkeypatch.setattr(liger, "has_triton", lambda: True)
    monkeypatch.setattr(liger, "missing_package", lambda *_: "")
    monkeypatch.setattr("lorakeet.models.kernels.missing_package", lambda *_: "")
    monkeypatch.setattr("lorakeet.models.kernels.has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    for kept in (support._capability, why_no_launcher):
        kept.cache_clear()
    yield
    for kept in (support._capability, why_no_launcher):
        kept.cache_clear()


def said_everywhere() -> set[str]:
    """What keeps kernels of Triton from running: liger-kernel's, our own, and what a run says before it loads."""
    (before,) = missing_libraries(CUDA, QuantSpec())
    return {
        liger.why_not(Situation(CUDA, torch.float16, torch.float16)),
        why_not_on(CUDA).removesuffix(", or set model.kernels to torch."),
        before.partition(". Until then")[0],
    }


@pytest.mark.parametrize(
    ("compiler", "words"),
    [(None, "there is no C compiler. Install gcc (on Debian: apt install gcc), or set CC"), ("cc-42", "is 'cc-42', and no such")],
)
def test_without_a_compiler_no_kernel_of_triton_is_planned(
    compiler: str | None, words: str, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a plan counts kernels that the run leaves out, at their first use and with a warning to report it."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    if compiler is not None:
        monkeypatch.setenv("CC", compiler)
    (said,) = said_everywhere()
    assert words in said


def test_without_headers_of_python_neither(on_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/gcc")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(support.sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})
    (said,) = said_everywhere()
    assert f"no Python.h in {tmp_path}. Install it" in said
    (tmp_path / "Python.h").touch()
    why_no_launcher.cache_clear()
    assert not why_no_launcher() and not why_not_on(CUDA) and not [*missing_libraries(CUDA, QuantSpec())]
    assert not liger.why_not(Situation(CUDA, torch.float16, torch.float16))


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
    monkeypatch.setattr(support, "why_no_launcher", lambda: "")
    gpus = {97: (7, 5), 98: (8, 0), 99: (9, 0)}  # numbers that no GPU of this machine has
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    said = [why_not_on(torch.device("cuda", index)) for index in gpus]
    assert said[0].startswith("Triton kernels need an NVIDIA GPU of compute capability 8.0 or higher; this GPU has 7.5. ")
    assert said[1:] == ["", ""]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 97)
    assert why_not_on(torch.device("cuda")) == said[0]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "8.0 or higher; this torch is for AMD GPUs (ROCm 6.4). Set model.kernels" in why_not_on(torch.device("cuda", 1))
