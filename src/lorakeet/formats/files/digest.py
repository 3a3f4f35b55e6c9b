"""SHA-256 of files, read in pieces so that a model of any size passes through a small buffer."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lorakeet.disk import open_buffered

PIECE = 1 << 20  # bytes


def sha256_of(*paths: Path) -> str:
    """The hexadecimal SHA-256 over the bytes of the files, one after the other."""
    found = hashlib.sha256()
    for path in paths:
        add_file(found, path)
    return found.hexdigest()


def add_file(found: hashlib._Hash, path: Path) -> None:
    """Adds the bytes of `path` to a hash in progress."""
    with open_buffered(path) as file:
        while piece := file.read(PIECE):
            found.update(piece)
