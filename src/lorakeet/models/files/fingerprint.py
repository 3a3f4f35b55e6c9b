"""A hash of a model folder, by which a resumed run checks that its base is unchanged."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from lorakeet.disk import open_buffered, read_regular
from lorakeet.formats.files.digest import add_file, sha256_of

WHOLE = 256 * 2**20  # bytes: shards that are smaller together are hashed whole, in about a second
WINDOWS, WINDOW = 16, 256  # pieces of each tensor of a larger model, and their bytes
_FILE_WINDOWS, _FILE_WINDOW = 4096, 1024  # pieces of a larger single file, and their bytes


def fingerprint(folder: Path) -> str:
    """Returns the SHA-256 of config.json and the safetensors shards of `folder`; DataError for a damaged shard.

    Small models are hashed whole. Of larger ones: names, dtypes, shapes, file sizes, and 16 evenly spaced pieces of 256 bytes of
    each tensor. Training changes nearly every number, so it is detected; a few numbers edited by hand may not be. Files that did
    not change since this process hashed them, by their size and time, are not read again.
    """
    files = (folder / "config.json", *sorted(folder.glob("*.safetensors")))
    stats = [file.stat() for file in files]
    whole = sum(stat.st_size for stat in stats[1:]) <= WHOLE
    return _hashed(files, tuple((stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats), 0 if whole else WINDOW)


def content_of(model: Path) -> str:
    """As `fingerprint`, also of a folder of diffusers, part by part, and of a single file."""
    if model.is_dir():
        if (model / "config.json").is_file():
            return fingerprint(model)
        parts = [(part.name, fingerprint(part)) for part in sorted(model.iterdir()) if (part / "config.json").is_file()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()
    stat = model.stat()
    return _hashed_file(model, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=8)
def _hashed_file(model: Path, size: int, *_: int) -> str:
    """The hash of a single file; the further numbers tell a file that changed."""
    if size <= WHOLE:
        return sha256_of(model)
    found = hashlib.sha256(str(size).encode())
    with open_buffered(model) as file:
        for place in range(_FILE_WINDOWS):
            file.seek((size - _FILE_WINDOW) * place // (_FILE_WINDOWS - 1))
            found.update(file.read(_FILE_WINDOW))
    return found.hexdigest()


@lru_cache(maxsize=8)
def _hashed(files: tuple[Path, ...], stats: tuple[tuple[int, int, int], ...], window: int) -> str:
    """The hash of `files`, config.json first, whole or in pieces of `window` bytes; other `stats` are of files that changed."""
    config, *shards = files
    found = hashlib.sha256(read_regular(config))
    for shard in shards:
        found.update(f"\n{shard.name} {shard.stat().st_size}\n".encode())
        if window:
            _add_pieces(found, shard, window)
        else:
            add_file(found, shard)
    return found.hexdigest()


def _add_pieces(found: hashlib._Hash, shard: Path, window: int) -> None:
    from lorakeet.formats.files.safetensors_file import open_safetensors  # imports torch, which small models do without

    opened = open_safetensors(shard)
    with open_buffered(shard) as file:
        for name, stored in sorted(opened.tensors.items()):
            found.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
            last = max(stored.begin, stored.end - window)
            for offset in sorted({stored.begin + (last - stored.begin) * step // (WINDOWS - 1) for step in range(WINDOWS)}):
                file.seek(offset)
                found.update(file.read(min(window, stored.end - offset)))
