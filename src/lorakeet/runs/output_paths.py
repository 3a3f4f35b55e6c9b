"""Where results go: checked before the work begins, and what the system refuses is said in words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.kernels.cache import cache_folder
from lorakeet.train.durable import refusal


def folder_above(path: Path) -> Path:
    """The nearest of the folders around `path` that is there: it has the disk that `path` will lie on."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def require_place(out: Path) -> None:
    """Raises EnvironmentProblem unless a new folder can be made at `out`; nothing is made."""
    above = folder_above(out)
    if not above.is_dir():
        raise EnvironmentProblem(f"{out} cannot be made, since {above} is a file. Choose another --out.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise EnvironmentProblem(f"{out} cannot be made: {above} may not be written to. Choose another --out.")


def require_absent(out: Path) -> None:
    """Raises ConfigError if something is at `out`."""
    if out.exists():
        said = f"{out} exists already and is never overwritten. Choose another --out or remove that one."
        raise ConfigError(said, code="output-exists", values={"path": str(out)})


def require_new_place(out: Path) -> None:
    """Raises ConfigError if something is at `out`, EnvironmentProblem unless it can be made."""
    require_absent(out)
    require_place(out)


def require_empty(out: Path) -> None:
    """Raises ConfigError unless `out` is missing or an empty folder, and EnvironmentProblem where it cannot be made."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        said = f"{out} exists already and is no empty folder; nothing in it was touched. Choose another --out."
        raise ConfigError(said, code="output-exists", values={"path": str(out)})
    require_place(out)


def store_folder(named: str, out: Path | None) -> Path:
    """Where stores of streamed weights are: in the folder `named` (memory.store); else beside `out`, which is being written and
    after which its stores are removed; stores that are kept for later runs (no `out`) are in the cache folder.
    """
    if out is None:
        return Path(named).expanduser() if named else cache_folder() / "stores"
    whole = out.absolute()
    if not named:
        return whole.parent / f".{out.name}.blocks"
    return Path(named).expanduser() / f".{out.name}-{sha256(str(whole).encode()).hexdigest()[:12]}.blocks"


@contextmanager
def temporary_folder(folder: Path | None, what: str, remedy: str) -> Iterator[None]:
    """A context in which `folder` is there, new and empty, and after which it is gone; None for no folder.

    A disk that refuses it, or a store in it, is reported with `remedy` (EnvironmentProblem).
    """
    if folder is None:
        yield
        return
    from lorakeet.memory.store import StoreRefused  # imports torch, which the checks of paths do without

    shutil.rmtree(folder, ignore_errors=True)
    try:
        with writing(what, remedy):
            folder.mkdir(parents=True)
        yield
    except StoreRefused as error:
        raise EnvironmentProblem(f"{error} {remedy}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """A context in which a refused write becomes an EnvironmentProblem that ends with `remedy`, worded for a full disk."""
    try:
        yield
    except OSError as error:
        raise refusal(error, f"{what} could not be written", remedy) from error
