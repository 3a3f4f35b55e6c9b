"""`lorakeet doctor`: what this machine has, what is missing, and how to install it. Downloads and changes nothing."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from lorakeet.errors import LorakeetError
from lorakeet.memory.budget import available_memory
from lorakeet.registry import declarations
from lorakeet.verbs.options import DoctorOptions
from lorakeet.verbs.packages import QUICKSTART_PACKAGES, USER_EXTRAS, installed_version, pip_command, requirements_of

if TYPE_CHECKING:
    from rich.console import Console

    from lorakeet.models.nvidia import NvidiaGpus

__all__ = ["Checkup", "Finding", "doctor"]

GIB = 1024**3
MEMORY_WANTED = 3 * GIB  # more than the quickstart takes
DISK_WANTED = 2 * GIB  # the dense copy of the quickstart's model, a run and its checkpoints


@dataclass(frozen=True)
class Finding:
    """One check of the machine."""

    name: str
    good: bool
    found: str
    remedy: str = ""  # a command or a sentence; empty if `good`
    required: bool = False


@dataclass(frozen=True)
class KernelUse:
    """The kernel that a task uses on a device of this machine, and why not each one before it in kernels/choose.TABLE."""

    task: str
    device: str
    used: str
    needs: str  # what a call must have; others use the next kernel
    passed_over: dict[str, str]  # reasons by kernel


@dataclass(frozen=True)
class Checkup:
    """All checks; `exit_code` is 2 if something required is missing."""

    findings: tuple[Finding, ...]
    kernels: tuple[KernelUse, ...] = ()

    @property
    def exit_code(self) -> int:
        return 0 if all(finding.good for finding in self.findings if finding.required) else 2

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {"ok": self.exit_code == 0, **asdict(self)}


def doctor(options: DoctorOptions = DoctorOptions(), *, console: Console) -> Checkup:
    """Checks this machine and prints a table, with the commands that install what is missing."""
    version, fits = ".".join(map(str, sys.version_info[:3])), (3, 10) <= sys.version_info[:2] <= (3, 13)
    remedy = "" if fits else "Install Python 3.10 to 3.13 and make a new environment with it."
    needs = requirements_of("")
    packages = _packages("packages", needs, f"{len(needs)} installed", "missing or outdated: ", required=True)
    findings = [Finding("python", fits, version, remedy, True), packages]
    if packages.good:
        findings += _torch()
    for name, purpose in USER_EXTRAS.items():
        findings.append(_packages(f"extra [{name}]", requirements_of(name), purpose, f"{purpose}; missing: "))
    quickstart = [Requirement(line) for line in QUICKSTART_PACKAGES]
    findings.append(_packages("quickstart", quickstart, "its model and its data", "missing: ", "--no-deps"))
    findings += [_kinds(), _memory(), _disk(Path.cwd())]
    kernels: tuple[KernelUse, ...] = ()
    if all(finding.good for finding in findings if finding.required):
        kernels = tuple(kernels_used())
        from lorakeet.kernels.cache import cache_folder  # needs the packages checked above

        findings.append(_cache(cache_folder()))
    findings.append(_hub(os.environ))
    checkup = Checkup(tuple(findings), kernels)
    _print(checkup, console)
    return checkup


def _packages(name: str, needs: Sequence[Requirement], found: str, lacking: str, *flags: str, required: bool = False) -> Finding:
    """The check of packages: `found` where all are installed, else `lacking` and the names of the others."""
    missing = [need for need in needs if installed_version(need) is None]
    words = lacking + ", ".join(need.name for need in missing) if missing else found
    return Finding(name, not missing, words, pip_command(missing, *flags) if missing else "", required)


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that torch needs is missing
        remedy = pip_command([need for need in requirements_of("") if need.name == "torch"], "--force-reinstall")
        return [Finding("torch", False, f"cannot be imported: {error}", remedy, True)]
    from lorakeet.kernels.cpu.compile import suits_machine, why_not
    from lorakeet.models.nvidia import find_nvidia_gpus, unused_gpus
    from lorakeet.models.placement import device_for, dtype_for

    processor = torch.device("cpu")
    stored = dtype_for("auto", processor)
    products = _products()
    dtypes = f"weights stored as {_word(stored)}, multiplied as {_word(products)} (measured)"
    kernels = Finding("kernels", True, "attention and elementwise operations in C, compiled here")
    if reason := why_not():  # not good only if the processor supports them and something is missing
        remedy = "Install gcc 12 or later (on Debian: apt install gcc), or set CC to it." if suits_machine() else ""
        kernels = Finding("kernels", not suits_machine(), f"torch's own: {reason}", remedy)
    name = str(torch.cpu.get_capabilities().get("cpu_name") or torch.backends.cpu.get_cpu_capability())
    return [
        Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads", required=True),
        Finding("processor", True, f"{name}: {dtypes}"),
        kernels,
        _accelerator(torch, device_for("auto"), find_nvidia_gpus(), unused_gpus()),
    ]


@functools.cache
def _products() -> Any:
    """The dtype in which the processor multiplies fastest, measured once."""
    import torch

    from lorakeet.core.precision import fastest_products
    from lorakeet.models.placement import dtype_for

    processor = torch.device("cpu")
    return fastest_products(dtype_for("auto", processor), processor)


def kernels_used() -> list[KernelUse]:
    """For the processor, and a GPU if there is one, the kernel of every task, in the order of the table."""
    import torch

    from lorakeet.kernels.choose import TABLE, passed_over
    from lorakeet.kernels.protocol import Situation
    from lorakeet.models.placement import device_for, text_dtype_for

    found = []
    for device in dict.fromkeys((torch.device("cpu"), device_for("auto"))):
        dtype = text_dtype_for("auto", device)
        situation = Situation(device, dtype, _products() if device.type == "cpu" else dtype)
        for task in TABLE:
            kernel, skipped = passed_over(task, situation)
            reasons = {each.name: reason for each, reason in skipped}
            found.append(KernelUse(task, f"{device.type}, {_word(dtype)}", kernel.name, kernel.needs, reasons))
    return found


def _word(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _accelerator(torch: Any, device: Any, nvidia: NvidiaGpus, unused: str) -> Finding:
    """The check of the GPU: each with its memory, compute capability and driver; or why torch uses none, with the remedy."""
    from lorakeet.models.nvidia import unusable

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        each = ", ".join(
            f"{gpu.name} with {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}" for gpu in gpus
        )
        found = f"{each}; driver {nvidia.driver or 'unknown'}, torch built for CUDA {torch.version.cuda}"
        remedy = "" if device.type == "cuda" else f"Take another GPU, or set model.device to cpu: {unusable(0)}."
        return Finding("GPU", not remedy, found, remedy)
    if unused:
        return Finding("GPU", False, f"{nvidia.words}; torch {torch.__version__} does not use it", unused)
    return Finding("GPU", True, "Apple Metal (device mps)" if device.type == "mps" else "none; training runs on the processor")


def _kinds() -> Finding:
    try:
        return Finding("kinds of runs", True, ", ".join(declarations()), required=True)
    except LorakeetError as error:
        return Finding("kinds of runs", False, str(error), "Uninstall the package that is named.", required=True)


def _memory() -> Finding:
    free, words = available_memory()
    good = free >= MEMORY_WANTED
    remedy = "" if good else f"Close other programs, or take a smaller model; the quickstart needs {MEMORY_WANTED / GIB:.0f} GiB."
    return Finding("memory", good, f"{free / GIB:.1f} GiB {words}", remedy)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    good = free >= DISK_WANTED
    remedy = "" if good else f"Free some space, or work in another folder; a run needs about {DISK_WANTED / GIB:.0f} GiB."
    return Finding("disk", good, f"{free / GIB:.1f} GiB free in {folder}", remedy)


def _cache(folder: Path) -> Finding:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        remedy = "export LORAKEET_CACHE=/a/folder/that/you/may/write"
        return Finding("cache", False, f"{folder} cannot be written: {error.strerror}", remedy, True)
    return Finding("cache", True, f"{folder} can be written", required=True)


def _hub(environment: Mapping[str, str]) -> Finding:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if environment.get(name, "").upper() in ("1", "TRUE", "YES", "ON"):
            return Finding("model hub", True, f"switched off by {name}; local folders and .gguf files work")
    return Finding("model hub", True, "used only for hub ids; not tried now")


def _print(checkup: Checkup, console: Console) -> None:
    from rich.text import Text

    from lorakeet.runs.terminal import WholeTable

    table = WholeTable("", "What", "Found", box=None, pad_edge=False)
    ordered = sorted(checkup.findings, key=lambda one: (one.good, not one.required))  # what is wrong comes first
    for finding in ordered:
        mark = Text("ok", "green") if finding.good else Text("missing", "bold red" if finding.required else "yellow")
        table.add_row(mark, Text(finding.name), Text(finding.found))
    console.print(table)
    for finding in ordered:
        if not finding.good:
            kind = "required" if finding.required else "optional"
            console.print(Text(f"\n{finding.name} ({kind}), to fix it:\n  {finding.remedy}"), soft_wrap=True)
    for device in dict.fromkeys(use.device for use in checkup.kernels):  # the tasks, the kernel of each, why not those before it
        table = WholeTable(f"Kernels ({device})", "Used", "Not used, since", box=None, pad_edge=False)
        for use in checkup.kernels:
            if use.device == device:
                reasons = "\n".join(f"{name}: {reason}" for name, reason in use.passed_over.items())
                table.add_row(Text(use.task), Text(use.used), Text(reasons))
        console.print()
        console.print(table)
    missing = [finding.name for finding in ordered if finding.required and not finding.good]
    said = f"Required and missing: {', '.join(missing)}; see above." if missing else "Everything required is installed."
    console.print(f"\n{said}")
