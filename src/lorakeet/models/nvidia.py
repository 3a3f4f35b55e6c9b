"""NVIDIA GPUs of this machine that torch does not use: why, and the command that mends it.

The driver is looked at in /proc and /dev, and asked through nvidia-smi, so that this works with a torch that knows no CUDA.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

LEAST_CAPABILITY = (7, 5)  # Turing: CUDA 13 has no code for older ones, and nothing here was made for them
DRIVERS = {11: 450, 12: 525, 13: 580}  # of NVIDIA's driver on Linux, the least branch for a major version of CUDA
OLD_WHEELS, OLD_CUDA = "cu126", 12  # torch's last wheels for the drivers before CUDA 13
NEW_WHEELS = "cu130"
HIDDEN = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")  # variables that can hide GPUs on purpose
_SECONDS = 10  # that nvidia-smi may take


@dataclass(frozen=True)
class NvidiaGpus:
    """The NVIDIA GPUs of this machine, whether torch can use them or not; all empty if there is none."""

    names: tuple[str, ...] = ()
    driver: str = ""  # its version, if it is loaded

    @property
    def words(self) -> str:
        """The GPUs and their driver."""
        driver = f"driver {self.driver}" if self.driver else "a driver of unknown version"
        return f"{', '.join(self.names)}, {driver}" if self.names else ""


def find_nvidia_gpus(root: Path = Path("/"), program: str | None = "nvidia-smi") -> NvidiaGpus:
    """The GPUs that nvidia-smi (None: not asked) or the files of the driver under `root` name."""
    if program is not None and (path := shutil.which(program)):
        command = [path, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            said = ""
        found = [[part.strip() for part in line.split(",")] for line in said.splitlines() if line.count(",") == 1]
        if found:
            return NvidiaGpus(tuple(name for name, _ in found), found[0][1])
    names = tuple(_model(file) for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")))
    if not names:
        names = tuple("an NVIDIA GPU" for _ in (root / "dev").glob("nvidia[0-9]*"))
    return NvidiaGpus(names, _driver(root / "proc/driver/nvidia/version") if names else "")


def _model(file: Path) -> str:
    for line in _lines(file):
        name, _, value = line.partition(":")
        if name.strip() == "Model":
            return value.strip()
    return "an NVIDIA GPU"


def _driver(file: Path) -> str:
    """The version in "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 …"."""
    words = next(iter(_lines(file)), "").split()
    return next((word for word in words if word.replace(".", "").isdigit() and "." in word), "")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


@cache
def unused_gpus() -> str:
    """Why torch uses none of this machine's NVIDIA GPUs, with the command that mends it; empty where it does or there is none."""
    if torch.cuda.is_available() or torch.version.hip is not None or hidden(os.environ):
        return ""
    return why_unused(find_nvidia_gpus(), str(torch.__version__), torch.version.cuda)


def hidden(environment: Mapping[str, str]) -> bool:
    """True if a variable hides all GPUs on purpose."""
    return any(environment.get(name, "all").strip().lower() in ("", "-1", "none", "void") for name in HIDDEN)


def why_unused(gpus: NvidiaGpus, version: str, cuda: str | None) -> str:
    """The same for these GPUs and a torch of that `version`, built for `cuda`, which finds no CUDA device."""
    if not gpus.names:
        return ""
    driver = int(gpus.driver.partition(".")[0] or 0)
    here = f"This machine has {gpus.words}, but torch {version}"
    if cuda is None:
        wheels = OLD_WHEELS if driver and driver < DRIVERS[OLD_CUDA + 1] else NEW_WHEELS
        return f"{here} is built without CUDA. Install one with it: {torch_command(wheels)}"
    least = DRIVERS.get(int(cuda.partition(".")[0]), max(DRIVERS.values()))
    if driver and driver < least:
        older = f", or install a torch for older drivers: {torch_command(OLD_WHEELS)}" * (DRIVERS[OLD_CUDA] <= driver)
        return f"{here} is built for CUDA {cuda}, which needs driver {least} or later. Update the driver{older}"
    return f"{here} (CUDA {cuda}) finds no CUDA device. See what its driver says: nvidia-smi"


def torch_command(wheels: str) -> str:
    """The command that puts a torch with these wheels in place of the one of this environment."""
    index = f"https://download.pytorch.org/whl/{wheels}"
    return f"{sys.executable} -m pip install --force-reinstall torch --index-url {index}"


def unusable(index: int) -> str:
    """Why CUDA device `index` cannot be used, with the command that mends it if one does; empty if it can."""
    return too_old(index) or no_code_for(index)


def no_code_for(index: int) -> str:
    """That torch has no code for CUDA device `index`, by torch's own rule (code of one major version runs on later minor ones),
    nor code that the driver would compile (PTX): its first kernel would fail, "no kernel image is available"."""
    built = torch.cuda.get_arch_list() if torch.version.hip is None else []
    major, minor = torch.cuda.get_device_capability(index)
    found = [(kind, int(digits[:-1]), int(digits[-1])) for kind, digits in map(_architecture, built)]
    if not built or any(one == major if kind == "sm" else (one, two) <= (major, minor) for kind, one, two in found):
        return ""
    return (
        f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(index)} (compute capability {major}.{minor}; it "
        f"has {', '.join(built)}). Install one that has, by `{torch_command(NEW_WHEELS)}`, which needs driver "
        f"{max(DRIVERS.values())} or later"
    )


def _architecture(name: str) -> tuple[str, str]:
    """("sm", "90") of "sm_90a"."""
    kind, _, digits = name.partition("_")
    return kind, digits.rstrip("af")


def too_old(index: int) -> str:
    """Why CUDA device `index` is too old; empty if it is not."""
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) >= LEAST_CAPABILITY:
        return ""
    least = ".".join(map(str, LEAST_CAPABILITY))
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}; expected {least} or more (RTX 20, T4 and "
        "later)"
    )
