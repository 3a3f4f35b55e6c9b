"""`lorakeet doctor`: what is missing is named with the command that installs it."""

from __future__ import annotations

import io
import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from lorakeet.errors import EnvironmentProblem
from lorakeet.kernels.choose import TABLE, passed_over
from lorakeet.kernels.protocol import Situation
from lorakeet.models.nvidia import NvidiaGpus
from lorakeet.verbs import doctor as module
from lorakeet.verbs.doctor import Checkup, Finding, _kinds, doctor
from lorakeet.verbs.packages import pip_command
from tiny.other_packages import installed, registered


def printed(monkeypatch: pytest.MonkeyPatch) -> tuple[Checkup, str]:
    screen = io.StringIO()
    return doctor(console=Console(file=screen, width=100)), screen.getvalue()


def test_this_machine_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "new" / "cache"))
    checkup, text = printed(monkeypatch)
    assert checkup.exit_code == 0 and "Everything required is installed." in text
    assert not (tmp_path / "new").exists(), "looking must not create the folder"
    names = [finding.name for finding in checkup.findings]
    assert names[:2] == ["python", "packages"]
    assert {"torch", "processor", "GPU", "extra [gguf]", "memory", "disk", "cache", "model hub"} <= set(names)
    assert json.loads(json.dumps(checkup.to_mapping()))["ok"] is True


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy>=1.26", "no-such-package<3,>=2", "numpy>=999; extra == 'gguf'", "numpy>=1; extra == 'hub'"]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    checkup, text = printed(monkeypatch)
    assert checkup.exit_code == 2
    by_name = {finding.name: finding for finding in checkup.findings}
    assert by_name["packages"].remedy == f"{sys.executable} -m pip install 'no-such-package<3,>=2'"
    assert by_name["packages"].required and by_name["packages"].remedy in text
    assert by_name["extra [gguf]"].remedy.endswith("'numpy>=999'") and not by_name["extra [gguf]"].required
    assert by_name["extra [hub]"].good
    _, *lines = text.splitlines()
    assert "packages" in lines[0] and "extra [gguf]" in lines[1], "what is wrong comes first"


def test_only_what_is_required_decides_the_exit_code() -> None:
    assert Checkup((Finding("a", True, "x", required=True), Finding("b", False, "y", "do"))).exit_code == 0
    assert Checkup((Finding("a", False, "x", "do", required=True),)).exit_code == 2


def test_a_cache_that_cannot_be_written_is_required_and_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", "/proc/lorakeet")
    checkup, text = printed(monkeypatch)
    assert checkup.exit_code == 2 and "export LORAKEET_CACHE=" in text


@pytest.mark.parametrize(("value", "words"), [("1", "switched off by HF_HUB_OFFLINE"), ("0", "not tried now")])
def test_the_hub_is_never_contacted(monkeypatch: pytest.MonkeyPatch, value: str, words: str) -> None:
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert words in printed(monkeypatch)[1]


def test_commands_can_be_pasted_into_a_shell() -> None:
    command = pip_command([Requirement("a>=1,<2"), Requirement("b==3")], "--no-deps")
    assert command.endswith("-m pip install --no-deps 'a<2,>=1' b==3")


def test_the_kernels_of_each_task_are_listed_in_the_order_of_the_table_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    checkup, text = printed(monkeypatch)
    on_cpu = [use for use in checkup.kernels if use.device.startswith("cpu")]
    assert [use.task for use in on_cpu] == list(TABLE)
    places = [text.index(f"\n{use.task} ") for use in on_cpu]
    assert places == sorted(places)
    dtype = getattr(torch, on_cpu[0].device.removeprefix("cpu, "))
    for use in on_cpu:
        kernel, skipped = passed_over(use.task, Situation(torch.device("cpu"), dtype, module._products()))
        assert use.used == kernel.name and use.needs == kernel.needs
        assert list(use.passed_over.items()) == [(each.name, reason) for each, reason in skipped]
        words = " ".join(text.split())
        assert all(name.split(":")[0] in words for name in use.passed_over)
    assert json.loads(json.dumps(checkup.to_mapping()))["kernels"][0]["task"] == on_cpu[0].task


def test_on_a_gpu_each_choice_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 without liger-kernel: text in float16, attention by the memory-efficient kernel, and the command that installs it."""
    from lorakeet.kernels import efficient_varlen, flash_varlen
    from lorakeet.models import placement

    monkeypatch.setattr(placement, "device_for", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    for cached in (flash_varlen._has_kernel, efficient_varlen._has_kernel):
        cached.cache_clear()
    try:
        uses = {use.task: use for use in module.kernels_used() if use.device == "cuda, float16"}
    finally:
        for cached in (flash_varlen._has_kernel, efficient_varlen._has_kernel):
            cached.cache_clear()
    assert [*uses] == list(TABLE)
    assert uses["attention"].used == "torch: memory-efficient varlen"
    assert uses["attention"].passed_over["torch: flash varlen"] == "this torch has no flash attention for the GPU"
    norms = uses["elementwise ops"]
    assert norms.used.startswith("Liger") or "pip install" in norms.passed_over["Liger: norm, gate, rotary positions"]
    assert uses["dequantise"].used.startswith("bitsandbytes") or "pip install" in str(uses["dequantise"].passed_over)


def test_without_an_installed_package_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    with pytest.raises(EnvironmentProblem, match=r"Lorakeet is not installed in .* -m pip install --editable \."):
        module.doctor(console=Console(quiet=True))


def test_a_gpu_is_named_with_its_driver_and_one_that_torch_does_not_use_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia = NvidiaGpus(("NVIDIA GeForce RTX 3060",), "535.104.05")
    unused = module._accelerator(torch, torch.device("cpu"), nvidia, "Update the driver")
    assert not unused.good and not unused.required and unused.remedy == "Update the driver"
    assert "RTX 3060, driver 535.104.05; torch" in unused.found
    none = module._accelerator(torch, torch.device("cpu"), NvidiaGpus(), "")
    assert none.good and none.found == "none; training runs on the processor"
    gpu = SimpleNamespace(name="RTX 3060", total_memory=12 << 30, major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    used = module._accelerator(torch, torch.device("cuda", 0), nvidia, "")
    assert used.good and "RTX 3060 with 12 GiB, compute capability 8.6; driver 535.104.05, torch built for CUDA" in used.found
    gpu.major, gpu.minor = 7, 0
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (gpu.major, gpu.minor))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu.name)
    old = module._accelerator(torch, torch.device("cpu"), nvidia, "")
    assert not old.good and "RTX 3060 has compute capability 7.0; expected 7.5 or more" in old.remedy


def test_a_package_whose_kind_of_run_is_broken_is_a_finding(tmp_path: Path) -> None:
    with registered(installed(tmp_path, "broken", "line_kind.gone")):
        found = _kinds()
    assert not found.good and found.required and "of the package broken cannot be imported" in found.found
    assert _kinds().found.startswith("text, preference, image")
