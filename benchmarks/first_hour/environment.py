"""What this machine lacks for a first hour, in one message and exit code 2: `python -m first_hour.environment WHEELS [toy]`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def main(arguments: Sequence[str]) -> None:
    wheels, *toy = arguments
    if problem := refusal(wheels, toy=bool(toy)):
        print(problem)
        sys.exit(2)


def refusal(wheels: str, *, toy: bool) -> str:
    """Why nothing can be measured here, with the remedy; empty if it can."""
    if lacking := packages_lacking(needs(), version_of):
        return (
            f"These packages are missing here or of another version: {'; '.join(lacking)}. Where there is a network: make "
            f"gpu-wheels, and bring the folder {wheels} here; or install them."
        )
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported: {error}. Install it again."
    return "" if toy else gpu_refusal(torch)


def gpu_refusal(torch: Any) -> str:
    """Why the GPU cannot be measured; empty if it can."""
    from lorakeet.models.nvidia import find_nvidia_gpus, unusable, why_unused

    if not torch.cuda.is_available():
        why = why_unused(find_nvidia_gpus(), str(torch.__version__), torch.version.cuda)
        return why or f"torch {torch.__version__} sees no CUDA device here. Take a machine with an NVIDIA GPU, or add --rehearse."
    why = unusable(0)
    return f"{why}. Or take another GPU." if why else ""


def needs(project: Path = PROJECT) -> list[str]:
    """The requirements of the package: of the installed one, or of the tree beside this file."""
    try:
        found = metadata.requires("lorakeet")
    except metadata.PackageNotFoundError:
        found = None
    if found is None:
        part = re.search(r"^dependencies = \[(.*?)^\]", project.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        found = re.findall(r'^\s*"([^"]+)"', part.group(1) if part else "", re.MULTILINE)
    return [line for line in found if "extra ==" not in line]


def packages_lacking(lines: Sequence[str], versions: Callable[[str], str | None]) -> list[str]:
    """Each requirement that is not met: what is there, and what is expected."""
    from packaging.requirements import Requirement

    found = []
    for need in map(Requirement, lines):
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        here = versions(need.name)
        if here is None:
            found.append(f"{need.name} is missing (expected {need.specifier or 'any'})")
        elif not need.specifier.contains(here, prereleases=True):
            found.append(f"{need.name} is {here} (expected {need.specifier})")
    return found


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions_in(site: Path) -> Mapping[str, str]:
    """The packages of a folder with their versions."""
    return {part.metadata["Name"]: part.version for part in metadata.distributions(path=[str(site)])}


if __name__ == "__main__":
    main(sys.argv[1:])
