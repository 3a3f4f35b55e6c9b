"""An empty cache of unpacked files whose compiled kernels are those of the machine's own cache: to compile them takes 10 s."""

from __future__ import annotations

import os
from pathlib import Path


def new_cache(folder: Path) -> Path:
    """Makes `folder`, to be named by LORAKEET_CACHE, with a link to the compiled kernels."""
    named = os.environ.get("LORAKEET_CACHE")
    kernels = (Path(named).expanduser() if named else Path.home() / ".cache" / "lorakeet") / "native"
    folder.mkdir(parents=True)
    kernels.mkdir(parents=True, exist_ok=True)
    (folder / "native").symlink_to(kernels.resolve(), target_is_directory=True)
    return folder
