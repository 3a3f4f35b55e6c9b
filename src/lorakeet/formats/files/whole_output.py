"""Files and folders that appear at their path whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakeet.errors import ConfigError, EnvironmentProblem

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_new(out: Path) -> None:
    """Raises ConfigError if `out` exists."""
    if out.exists():
        raise ConfigError(f"{out} exists already and is never overwritten. Choose another name or remove it.")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file to; it is flushed and replaces `path` unless the block raises."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_output(out: Path, needed: int, what: str) -> Iterator[Path]:
    """Yields a path beside `out` to make a file or folder at; it is renamed to `out` unless the block raises.

    EnvironmentProblem if the disk lacks the `needed` bytes of `what`, before or during the block. Nothing is left behind then.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out.parent).free < needed:
        raise _disk_full(out.parent, needed, what)
    partial = out.with_name(f".{out.name}.partial")
    _remove(partial)
    try:
        yield partial
        if partial.is_file():
            _flush(partial)
        os.rename(partial, out)
    except OSError as error:
        _remove(partial)
        if error.errno in _DISK_FULL:
            raise _disk_full(out.parent, needed, what) from error
        raise
    finally:
        _remove(partial)


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _disk_full(folder: Path, needed: int, what: str) -> EnvironmentProblem:
    free = shutil.disk_usage(folder).free
    return EnvironmentProblem(
        f"{what} needs {needed:,} bytes on the disk of {folder}, and {free:,} are free. "
        "Free some space or name an --out on another disk; nothing was left behind."
    )
