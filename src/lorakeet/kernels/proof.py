"""Other libraries' kernels before their first use: whether the library is there, and whether the comparison ran at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import metadata

import torch
from packaging.specifiers import SpecifierSet

from lorakeet.errors import is_out_of_memory

SAID = 160  # characters of an error in a warning


@functools.cache
def missing_package(name: str, versions: SpecifierSet) -> str:
    """Why a package cannot be used; empty if it can. It is not imported."""
    install = f"Install it with: pip install '{name}{versions}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed. {install}"
    return "" if versions.contains(version, prereleases=True) else f"{name} is {version}; expected {versions}. {install}"


def difference_found(compare: Callable[[], str], *, of_any_kind: bool = False) -> str:
    """What `compare` finds without gradients, or that its kernel does not run; empty if both sides agree.

    torch's kernels raise RuntimeError; those of other libraries raise errors `of_any_kind`, which are named. A GPU that is out of
    memory says nothing of a kernel, so that error is raised.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            return compare()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if not of_any_kind and not isinstance(error, RuntimeError):
            raise
        kind = f"{type(error).__name__} " if of_any_kind else ""
        return f"does not run: {kind}{' '.join(str(error).split())[:SAID].rstrip('.')}"
