"""The folder for files that Lorakeet can make again, such as unpacked models and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder that LORAKEET_CACHE names, or ~/.cache/lorakeet."""
    named = os.environ.get("LORAKEET_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "lorakeet"
