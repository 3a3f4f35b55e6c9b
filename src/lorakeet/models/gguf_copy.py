"""A .gguf model as a dense safetensors folder, made once and kept in the cache folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lorakeet.errors import DataError, EnvironmentProblem, unreadable
from lorakeet.formats.digest import sha256_of
from lorakeet.formats.gguf_header import MAGIC
from lorakeet.models.gguf_sound import config_of_gguf, reading, require_gguf
from lorakeet.models.whole import first_line

_LAYOUT = 1  # counted up when what is written into a copy changes
_LARGEST_GROWTH = 10  # fp32 bytes of a copy per byte of a 3-bit file: the room that must be free


def cache_folder() -> Path:
    """Where copies are kept: the folder that LORAKEET_CACHE names, or ~/.cache/lorakeet."""
    named = os.environ.get("LORAKEET_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "lorakeet"


def dense_copy(path: Path, say: Callable[[str], None]) -> Path:
    """The folder with the dense fp32 copy and the tokenizer of a .gguf file; made if the cache has none of this content.

    The copy appears whole or not at all. Raises DataError for a file that is no readable GGUF, EnvironmentProblem where a
    package or room on the disk is missing.
    """
    folder = cache_folder() / "gguf"
    target = folder / f"{path.stem}-{content_digest(path)[:16]}-{_LAYOUT}"
    if (target / "config.json").is_file():
        return target
    require_gguf(path)
    require_room(path, folder, path.stat().st_size * _LARGEST_GROWTH)
    say(f"Unpacking {path.name} once into {target}; later runs read that copy.")
    make_whole(target, lambda partial: _convert(path, partial))
    return target


def make_whole(target: Path, make: Callable[[Path], None]) -> None:
    """Lets `make` write a model folder elsewhere on the same disk and moves it to `target`, which appears whole or not at all.

    EnvironmentProblem where the disk refuses it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacking-") as work:
            partial = Path(work) / "copy"
            make(partial)
            try:
                os.replace(partial, target)
            except OSError:
                if not (target / "config.json").is_file():  # otherwise another process was faster, with the same content
                    raise
    except (OSError, SafetensorError) as error:
        raise _unwritten(target, error) from error


def _unwritten(place: Path, error: Exception) -> EnvironmentProblem:
    why = getattr(error, "strerror", None) or first_line(error)
    return EnvironmentProblem(
        f"{place} cannot be written: {why}. Free some space, or set LORAKEET_CACHE to a folder that can be written."
    )


def _convert(path: Path, out: Path) -> None:
    config_of_gguf(path)
    with reading(path):
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.config.quantization_config = None
        del model.config.quantization_config
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise DataError(unreadable(path, error)) from error
    if magic != MAGIC:
        raise DataError(f"{path} is not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}. Fetch it again.")


def require_room(path: Path, folder: Path, wanted: int) -> None:
    """Raises EnvironmentProblem where the disk of `folder` has no `wanted` bytes for a copy of `path`."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise EnvironmentProblem(
            f"The copy of {path.name} needs up to {wanted / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free. "
            "Free some, or set LORAKEET_CACHE to a folder on a larger disk."
        )


def content_digest(path: Path) -> str:
    """sha256 of a .gguf file; computed once per path, size and time of change, and remembered in the cache.

    DataError for a file that cannot be read or is no GGUF, EnvironmentProblem for a cache that cannot be written.
    """
    _check_magic(path)
    folder = cache_folder() / "gguf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritten(folder, error) from error
    stat = path.stat()
    note = folder / "digests.json"
    known = _remembered(note)
    key, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
    if key in known and known[key][:2] == stamp:
        return str(known[key][2])
    digest = sha256_of(path)
    known[key] = [*stamp, digest]
    try:
        handle, partial = tempfile.mkstemp(dir=folder, prefix=".digests-")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(known, out, indent=1)
        os.replace(partial, note)
    except OSError as error:
        raise _unwritten(folder, error) from error
    return digest


def _remembered(note: Path) -> dict[str, Any]:
    """What was noted; nothing where the note is missing or damaged, since it can be made again."""
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        {key: value for key, value in known.items() if isinstance(value, list) and len(value) == 3}
        if isinstance(known, dict)
        else {}
    )
