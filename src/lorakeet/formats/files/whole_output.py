"""New outputs of a known size: the disk is checked before, and a full one is one message."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakeet.disk import FULL, written_whole
from lorakeet.errors import ConfigError, EnvironmentProblem


def require_new(out: Path) -> None:
    """Raises ConfigError if anything is at `out`, a link included."""
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists already and is never overwritten. Choose another name or remove it.")


@contextmanager
def new_output(out: Path, needed: int, what: str) -> Iterator[Path]:
    """Yields where to make the file or folder `out`, which appears when the block ends without an error (`disk.written_whole`).

    EnvironmentProblem if the disk lacks the `needed` bytes of `what`, before or during the block. Nothing is left behind then.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    require_free(out.parent, needed, what)
    try:
        with written_whole(out) as made:
            yield made
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(out.parent, needed, what) from error
        raise


def require_free(folder: Path, needed: int, what: str, *, written: int = 0) -> None:
    """Raises EnvironmentProblem if the disk of `folder` lacks the `needed` bytes of `what`, of which `written` are there."""
    if shutil.disk_usage(folder).free < needed - written:
        raise _disk_full(folder, needed, what)


def _disk_full(folder: Path, needed: int, what: str) -> EnvironmentProblem:
    free = shutil.disk_usage(folder).free
    bound = "" if free < needed else ", but a quota or a limit on the size of files ends before that"
    return EnvironmentProblem(
        f"{what} needs {needed:,} bytes on the disk of {folder}, and {free:,} are free{bound}. "
        "Free some space or name an --out on another disk; nothing was left behind."
    )
