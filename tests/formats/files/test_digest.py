"""Files hashed in pieces give the hash of their bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lorakeet.formats.files.digest import PIECE, add_file, sha256_of


def test_pieces_are_the_whole(tmp_path: Path) -> None:
    data = bytes(range(256)) * (PIECE // 256) + b"and a rest"
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(data)
    second.write_bytes(b"x")
    assert sha256_of(first) == hashlib.sha256(data).hexdigest()
    assert sha256_of(first, second) == hashlib.sha256(data + b"x").hexdigest()
    begun = hashlib.sha256(b"before")
    add_file(begun, second)
    assert begun.hexdigest() == hashlib.sha256(b"beforex").hexdigest()
