"""A hash of what a model folder holds, by which a resumed run knows that its base is still the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lorakeet.formats.files.digest import add_file
from lorakeet.formats.files.safetensors_file import open_safetensors

WHOLE = 256 * 2**20  # bytes: shards that are together smaller are hashed from end to end, about a second
WINDOWS, WINDOW = 16, 256  # of each tensor of a larger model, so many pieces of so many bytes


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and the safetensors shards of `folder`; DataError for a damaged shard.

    Small models are read whole. Of larger ones: names, dtypes, shapes and file sizes, and of each tensor 16 evenly spread
    pieces of 256 bytes: other training changes nearly every number, so it shows; a few numbers changed by hand may not.
    """
    found = hashlib.sha256((folder / "config.json").read_bytes())
    shards = sorted(folder.glob("*.safetensors"))
    whole = sum(shard.stat().st_size for shard in shards) <= WHOLE
    for shard in shards:
        found.update(f"\n{shard.name} {shard.stat().st_size}\n".encode())
        if whole:
            add_file(found, shard)
        else:
            _add_pieces(found, shard)
    return found.hexdigest()


def _add_pieces(found: hashlib._Hash, shard: Path) -> None:
    opened = open_safetensors(shard)
    with shard.open("rb") as file:
        for name, stored in sorted(opened.tensors.items()):
            found.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
            last = max(stored.begin, stored.end - WINDOW)
            for place in sorted({stored.begin + (last - stored.begin) * step // (WINDOWS - 1) for step in range(WINDOWS)}):
                file.seek(place)
                found.update(file.read(min(WINDOW, stored.end - place)))
