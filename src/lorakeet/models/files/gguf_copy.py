"""Copies of .gguf models in the cache folder, in the form that transformers reads, each made once and named by its content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorakeet.disk import open_buffered, read_regular, write_whole, written_whole
from lorakeet.errors import DataError, EnvironmentProblem, readable
from lorakeet.evaluate.wording import bytes_text
from lorakeet.formats.files.digest import sha256_of
from lorakeet.formats.files.gguf_header import MAGIC
from lorakeet.kernels.cache import cache_folder
from lorakeet.models.files.validate import first_line

_NOTE = "digests.json"


def make_whole(target: Path, make: Callable[[Path], None]) -> None:
    """Calls `make` to write a model folder beside `target` and moves it there, so that it appears whole or not at all.

    Raises EnvironmentProblem if it cannot be written.
    """
    try:
        with written_whole(target) as made:
            make(made)
    except (OSError, SafetensorError) as error:
        if not (target / "config.json").is_file():  # otherwise another process was faster, with the same content
            raise _unwritten(target, error) from error


def _unwritten(target: Path, error: Exception) -> EnvironmentProblem:
    why = getattr(error, "strerror", None) or first_line(error)
    return EnvironmentProblem(
        f"{target} cannot be written: {why}. Free some space, or set LORAKEET_CACHE to a folder that can be written."
    )


def require_disk_space(path: Path, folder: Path, size: int) -> None:
    """Raises EnvironmentProblem unless the disk of `folder` has `size` bytes free for a copy of `path`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise EnvironmentProblem(
            f"The copy of {path.name} needs up to {bytes_text(size)} in {folder}, which has {bytes_text(free)} free. Free some, "
            "or set LORAKEET_CACHE to a folder on a larger disk."
        )


def content_digest(path: Path) -> str:
    """Returns the SHA-256 of a .gguf file, cached by path, size and modification time.

    Raises DataError if the file cannot be read or is not a GGUF, EnvironmentProblem if the cache cannot be written.
    """
    with readable(path), open_buffered(path) as file:
        magic = file.read(4)
    if magic != MAGIC:
        raise DataError(f"{path} is not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}. Fetch it again.")
    folder = cache_folder() / "gguf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritten(folder, error) from error
    found = known_digest(path)
    if found:
        return found
    stat, note = path.stat(), folder / _NOTE
    known = {key: value for key, value in _remembered(note).items() if Path(key).is_file()}  # those of files that are gone go
    key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
    digest = sha256_of(path)
    known[key] = [*stamp, digest]
    try:
        write_whole(note, json.dumps(known, indent=1).encode())
    except OSError as error:
        raise _unwritten(folder, error) from error
    return digest


def known_digest(path: Path) -> str:
    """Returns the cached SHA-256 of a .gguf file; empty if there is none, or the file has changed since."""
    stat, known = path.stat(), _remembered(cache_folder() / "gguf" / _NOTE)
    size, time, digest = known.get(str(path.resolve()), (0, 0, ""))
    return str(digest) if (size, time) == (stat.st_size, stat.st_mtime_ns) else ""


def _remembered(note: Path) -> dict[str, Any]:
    """Returns the cached digests; empty if their file is missing or damaged, since they can be computed again."""
    try:
        known = json.loads(read_regular(note))
    except (OSError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {key: value for key, value in entries if isinstance(value, list) and len(value) == 3}
