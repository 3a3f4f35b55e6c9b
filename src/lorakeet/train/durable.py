"""Atomic writes of folders and files, safe against a killed process and a full disk.

A folder NAME is written as `.NAME.partial`, flushed, and renamed to `.NAME.ready`, which commits it. Then the old NAME is renamed
to `.NAME.old`, the new one to NAME, and the old one is deleted. `recover` finishes an interrupted replacement.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `target` when the block ends; on an error nothing changes."""
    partial, ready = _beside(target, "partial"), _beside(target, "ready")
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*"), reverse=True):
            flush(path)
        flush(partial)
        os.rename(partial, ready)
    except BaseException:
        _remove(partial)
        raise
    _put_in_place(target)


def recover(folder: Path) -> None:
    """Finishes or undoes every interrupted replacement in `folder`."""
    for ready in sorted(folder.glob(".*.ready")):
        _put_in_place(folder / ready.name[1 : -len(".ready")])
    for old in sorted(folder.glob(".*.old")):
        _remove(old)
    for partial in sorted(folder.glob(".*.partial")):
        _remove(partial)


def remove_folder(folder: Path) -> None:
    """Deletes `folder`; it is renamed first, so that its name never means a part of it."""
    old = _beside(folder, "old")
    _remove(old)
    os.rename(folder, old)
    _remove(old)


def write_file(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically."""
    partial = _beside(path, "partial")
    try:
        write_plain(partial, data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_plain(path: Path, data: bytes) -> None:
    """Writes `data` to `path` and syncs it to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Syncs a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def refusal(error: Exception, remedy: str) -> tuple[str, str]:
    """The cause of a failed write, and `remedy`, with "Free some space" replaced unless the disk is full."""
    if is_full(error):
        return "the disk (or the quota) is full", remedy
    return "the system refused", remedy.replace("Free some space", "See that files can be written there")


def _put_in_place(target: Path) -> None:
    ready, old = _beside(target, "ready"), _beside(target, "old")
    if target.exists():
        _remove(old)
        os.rename(target, old)
    os.rename(ready, target)
    flush(target.parent)
    _remove(old)


def _beside(target: Path, state: str) -> Path:
    return target.parent / f".{target.name}.{state}"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
