"""Atomic replacement of folders, safe against a killed process and a full disk.

A folder NAME is made whole as `.NAME.ready` (`disk.written_whole`), which commits it. Then the old NAME becomes `.NAME.old`, the
new one NAME, and the old one is deleted. `recover` finishes an interrupted replacement.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lorakeet.disk import FULL, erase, flush_folder, stage_in_use, written_whole
from lorakeet.errors import EnvironmentProblem

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `target` when the block ends; on an error nothing changes."""
    ready = _beside(target, "ready")
    erase(ready)  # of a process that was killed before its run was opened again
    with written_whole(ready) as made:
        made.mkdir()
        yield made
    _put_in_place(target)


def recover(folder: Path) -> None:
    """Finishes or undoes every interrupted replacement in `folder`; what another process writes there now is left alone."""
    for ready in sorted(folder.glob(".*.ready")):
        _put_in_place(folder / ready.name[1 : -len(".ready")])
    for old in sorted(folder.glob(".*.old")):
        erase(old)
    for partial in sorted(folder.glob(".*.partial")):
        if not stage_in_use(partial):
            erase(partial)


def remove_folder(folder: Path) -> None:
    """Deletes `folder`; it is renamed first, so that its name never means a part of it."""
    old = _beside(folder, "old")
    erase(old)
    os.rename(folder, old)
    erase(old)


@contextmanager
def as_os_error() -> Iterator[None]:
    """A context that turns a bare Exception "… (os error N)" of a Rust library into OSError N.

    The tokenizers library raises these for failed writes. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        number = _OS_ERROR.search(str(error))
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def is_full(error: Exception) -> bool:
    """True if the disk, the quota or the file size limit is exhausted."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return isinstance(error, SafetensorError) and any(f"os error {number}" in str(error) for number in FULL)


def refusal(error: Exception, what: str, remedy: str, more: str = "") -> EnvironmentProblem:
    """The error for a failed write: `what` failed, the cause, `more`, and `remedy`, in which "Free some space" is replaced unless
    the disk is full."""
    if is_full(error):
        return EnvironmentProblem(f"{what}: the disk (or the quota) is full ({error}).{more} {remedy}", code="disk-full")
    remedy = remedy.replace("Free some space", "See that files can be written there")
    return EnvironmentProblem(f"{what}: the system refused ({error}).{more} {remedy}")


def _put_in_place(target: Path) -> None:
    ready, old = _beside(target, "ready"), _beside(target, "old")
    if os.path.lexists(target):
        erase(old)
        os.rename(target, old)
    os.rename(ready, target)
    flush_folder(target.parent)
    erase(old)


def _beside(target: Path, state: str) -> Path:
    return target.parent / f".{target.name}.{state}"
