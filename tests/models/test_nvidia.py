"""An NVIDIA GPU that torch does not use: it is found, and the reason comes with the command that mends it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakeet.models import nvidia
from lorakeet.models.nvidia import NvidiaGpus, find_nvidia_gpus, hidden, too_old, unusable, unused_gpus, why_unused

VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 12\n"
CARD = NvidiaGpus(("NVIDIA GeForce RTX 3060",), "580.65.06")


@pytest.fixture
def looked_at() -> Iterator[None]:
    unused_gpus.cache_clear()
    yield
    unused_gpus.cache_clear()


def test_the_files_of_the_driver_name_the_cards(tmp_path: Path) -> None:
    assert find_nvidia_gpus(tmp_path, None) == NvidiaGpus() and find_nvidia_gpus(tmp_path, None).words == ""
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert find_nvidia_gpus(tmp_path, None).words == "an NVIDIA GPU, a driver of unknown version"
    gpu = tmp_path / "proc" / "driver" / "nvidia" / "gpus" / "0000:01:00.0"
    gpu.mkdir(parents=True)
    (gpu / "information").write_text("Model: \t\t NVIDIA GeForce RTX 3060\nIRQ:   \t\t 16\n")
    (tmp_path / "proc" / "driver" / "nvidia" / "version").write_text(VERSION.format("535.104.05"))
    assert find_nvidia_gpus(tmp_path, None) == NvidiaGpus(("NVIDIA GeForce RTX 3060",), "535.104.05")


@pytest.mark.parametrize(("lines", "status"), [("Tesla T4, 550.90\nTesla T4, 550.90", 0), ("It has failed, no driver", 9)])
def test_nvidia_smi_is_asked_first_and_its_failure_is_no_card(lines: str, status: int, tmp_path: Path) -> None:
    program = tmp_path / "smi"
    program.write_text(f"#!/bin/sh\necho '{lines}'\nexit {status}\n")
    program.chmod(0o755)
    expected = NvidiaGpus() if status else NvidiaGpus(("Tesla T4", "Tesla T4"), "550.90")
    assert find_nvidia_gpus(tmp_path, str(program)) == expected


@pytest.mark.parametrize(
    ("gpus", "cuda", "words"),
    [
        (NvidiaGpus(), None, ""),
        (CARD, None, f"3060, driver 580.65.06, but torch 2.13.0 is built without CUDA. Install one with it: {sys.executable} -m"),
        (CARD, None, "whl/cu130"),
        (NvidiaGpus(CARD.names, "535.104.05"), None, "whl/cu126"),
        (NvidiaGpus(CARD.names, "535.104.05"), "13.0", "for CUDA 13.0, which needs driver 580 or later. Update the driver, or"),
        (NvidiaGpus(CARD.names, "535.104.05"), "13.0", "whl/cu126"),
        (NvidiaGpus(CARD.names, "470.1"), "12.6", "needs driver 525 or later. Update the driver"),
        (CARD, "13.0", "finds no CUDA device. See what its driver says: nvidia-smi"),
    ],
)
def test_each_reason_has_its_command(gpus: NvidiaGpus, cuda: str | None, words: str) -> None:
    found = why_unused(gpus, "2.13.0", cuda)
    assert words in found and bool(found) == bool(words)
    assert "cu126" not in why_unused(NvidiaGpus(CARD.names, "470.1"), "2.13.0", "12.6"), "which it could not run either"


@pytest.mark.parametrize(("value", "hides"), [("", True), ("-1", True), ("void", True), ("0,1", False), ("all", False)])
def test_cards_that_are_hidden_on_purpose_are_not_missed(value: str, hides: bool) -> None:
    assert hidden({"CUDA_VISIBLE_DEVICES": value}) == hides and not hidden({})


@pytest.mark.usefixtures("looked_at")
def test_a_torch_without_cuda_beside_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in nvidia.HIDDEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(nvidia, "find_nvidia_gpus", lambda: CARD)
    assert "is built without CUDA" in unused_gpus()
    unused_gpus.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_gpus() == ""


OLD = ["sm_75", "sm_80", "sm_86", "sm_90"]  # of wheels for CUDA 12.6
NEW = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "built", "refused"),
    [
        ((12, 0), OLD, True), ((10, 0), OLD, True), ((12, 0), NEW, False), ((12, 1), NEW, False), ((10, 3), NEW, False),
        ((8, 9), OLD, False), ((9, 0), ["sm_80", "sm_90a"], False), ((11, 0), NEW, True),
        ((11, 0), [*NEW, "compute_100f"], False),
        ((12, 0), [], False), ((8, 0), ["compute_90"], True),
    ],
)  # fmt: skip
def test_a_torch_without_code_for_the_gpu_is_said_before_its_first_kernel_fails(
    capability: tuple[int, int], built: list[str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 5090")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    said = unusable(0)
    assert bool(said) == refused
    if refused:
        assert f"has no code for NVIDIA GeForce RTX 5090 (compute capability {capability[0]}.{capability[1]}; it has " in said
        assert "torch --index-url https://download.pytorch.org/whl/cu130`, which needs driver 580 or later" in said


@pytest.mark.parametrize(("capability", "refused"), [((7, 0), True), ((6, 1), True), ((7, 5), False), ((12, 0), False)])
def test_a_card_before_turing_is_too_old(capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    assert bool(too_old(0)) == refused
    assert not refused or f"Tesla V100 has compute capability {capability[0]}.{capability[1]}; expected 7.5" in too_old(0)
