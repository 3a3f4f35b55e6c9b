"""Where on this machine a call may load an adapter from: folders that were stated at the start, for some keys parts of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorakeet.errors import ConfigError
from lorakeet.serve.access import EVERYTHING, Caller

UPLOADS = "uploads"


class LoadPlaces:
    """The stated folders. `folders` hold adapters by name; `named` are the adapters that the server was started with."""

    def __init__(self, folders: Iterable[Path] = (), named: Mapping[str, Path] | None = None) -> None:
        self._folders = tuple(folder.expanduser().resolve() for folder in folders)
        self._named = {name: path.expanduser().resolve() for name, path in (named or {}).items()}

    def find(self, caller: Caller, given: str) -> Path:
        """The real path that `given` names. ConfigError if it lies, or a link in it leads, where this caller may not load from.

        The message is one and the same for what exists and what does not.
        """
        try:
            path = Path(given).expanduser().resolve()
            allowed = bool(given) and self._allowed(caller, path) and all(self._allowed(caller, end) for end in _ends(path))
        except (OSError, RuntimeError, ValueError):  # an unknown user, a loop of links, a zero byte
            allowed = False
        if not allowed:
            own = "" if EVERYTHING in caller.adapters else ", under the name of an adapter of this key"
            raise ConfigError(
                "lora_path is in no folder from which this call may load. Expected a path in --adapters-dir or --lora-paths, or "
                f"an adapter that the server was started with{own}."
            )
        return path

    def _allowed(self, caller: Caller, path: Path) -> bool:
        for name, place in self._named.items():
            if caller.sees(name) and (path == place or place in path.parents):
                return True
        for folder in self._folders:
            if folder in path.parents:
                parts = path.relative_to(folder).parts
                if not parts[0].startswith(".") and (EVERYTHING in caller.adapters or _name_of(parts) in caller.adapters):
                    return True
        return False


def _name_of(parts: tuple[str, ...]) -> str:
    """The adapter that a path below a stated folder belongs to: its folder, its file, or its upload."""
    if parts[0] == UPLOADS:
        return parts[1].rpartition("@")[0] if len(parts) > 1 else ""
    return parts[0] if len(parts) > 1 else Path(parts[0]).stem if "." in parts[0] else parts[0]


def _ends(path: Path) -> Iterable[Path]:
    """Where the links lead that readers of an adapter at `path` may open: those in its folder and in the `adapter` of a run."""
    for folder in (path, path / "adapter"):
        if folder.is_dir():
            with os.scandir(folder) as entries:
                yield from (Path(entry.path).resolve() for entry in entries if entry.is_symlink())
