"""Where Triton kernels of other libraries run, and the message where they do not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakeet.kernels import liger
from lorakeet.kernels import triton_support as support
from lorakeet.kernels.protocol import Situation
from lorakeet.kernels.triton_support import why_no_launcher
from lorakeet.models.missing_libraries import missing_libraries
from lorakeet.quant.spec import QuantSpec

CUDA = torch.device("cuda", 0)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU beside all packages; what is found of a compiler is forgotten."""
    monkeypatch.setattr(support, "has_triton", lambda: True)
    monkeypatch.setattr(liger, "has_triton", lambda: True)
    monkeypatch.setattr(liger, "missing_package", lambda *_: "")
    monkeypatch.setattr("lorakeet.models.missing_libraries.missing_package", lambda *_: "")
    monkeypatch.setattr("lorakeet.models.missing_libraries.has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    why_no_launcher.cache_clear()
    yield
    why_no_launcher.cache_clear()


def said_everywhere() -> set[str]:
    """What keeps liger-kernel's kernels from running: in the table, and what a run says before it loads."""
    (before,) = missing_libraries(CUDA, QuantSpec())
    return {
        liger.why_not(Situation(CUDA, torch.float16, torch.float16)),
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
    assert not why_no_launcher() and not [*missing_libraries(CUDA, QuantSpec())]
    assert not liger.why_not(Situation(CUDA, torch.float16, torch.float16))
