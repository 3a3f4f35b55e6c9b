"""The folder in which a server keeps uploaded adapters and its list of names: whole or not at all, whatever kills the server."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakeet.errors import ConfigError, DataError, LorakeetError
from lorakeet.formats.json_object import read_object
from lorakeet.formats.peft import MODEL_NAME
from lorakeet.formats.peft_config import CONFIG_NAME
from lorakeet.formats.safe import save_text
from lorakeet.serve.naming import check_name
from lorakeet.serve.probe import CERTIFICATE, Probe
from lorakeet.serve.registry import Registry

LIST = "registry.json"
UPLOADS = "uploads"
_INCOMING = ".incoming"
ACCEPTED = (CONFIG_NAME, MODEL_NAME, CERTIFICATE)  # the files of an upload; no pickle, no code


class Store:
    """Uploads and the list of names of one registry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._restoring = False
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / _INCOMING, ignore_errors=True)  # what a killed server had not finished

    def remember(self, registry: Registry) -> None:
        """Writes the list of names: it appears whole, so that a server that is killed finds the last state or the one before."""
        if self._restoring:
            return
        with self._lock:
            entries: dict[str, Any] = {}
            for version in registry.versions:
                probe = None if version.probe is None else version.probe.to_text()
                path, digest = str(version.source.path.resolve()), version.source.digest
                entries[version.name] = {"path": path, "digest": digest, "pinned": version.pinned, "probe": probe}
            save_text(self.folder / LIST, json.dumps({"adapters": entries}, indent=1, ensure_ascii=False) + "\n")

    def restore(self, registry: Registry, say: Callable[[str], None]) -> None:
        """Registers what the list names, then every adapter that lies in the folder by itself; `say` hears what is left out."""
        self._restoring = True
        try:
            for name, entry in self._listed().items():
                if name in registry.names:
                    continue
                try:
                    probe = Probe.from_text(entry["probe"], str(self.folder / LIST)) if entry["probe"] else None
                    pinned, digest = bool(entry["pinned"]), str(entry["digest"])
                    path = Path(entry["path"])
                    private = path.parent == (self.folder / UPLOADS).resolve()
                    registry.register(name, path, pinned=pinned, probe=probe, digest=digest, private=private)
                except (LorakeetError, KeyError, TypeError) as error:
                    say(f"'{name}' is not served: {error}")
            for path in sorted(self.folder.iterdir()):
                name = path.name.removesuffix(path.suffix) if path.is_file() else path.name
                if path.name in (LIST, UPLOADS) or path.name.startswith(".") or name in registry.names:
                    continue
                try:
                    registry.register(name, path)
                except LorakeetError as error:
                    say(f"{path.name} is not served: {error}")
        finally:
            self._restoring = False
        self.remember(registry)

    def _listed(self) -> dict[str, Any]:
        path = self.folder / LIST
        found: dict[str, Any] = {}
        if path.is_file():
            found = read_object(path, expected="the list of adapters that a server wrote").get("adapters", {})
        return found

    def incoming(self, name: str, file: str) -> Path:
        """Where a file of an upload is written while it comes in. ConfigError for names that are none."""
        check_name(name)
        if file not in ACCEPTED:
            raise ConfigError(f"The file {file!r} is not taken; an upload is {', '.join(ACCEPTED)}.")
        folder = self.folder / _INCOMING / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder / file

    def accept(self, name: str, registry: Registry, *, replace: bool) -> None:
        """Loads what came in for `name`; only if every check passes is it kept and visible. Errors as in Registry.load."""
        check_name(name)
        came = self.folder / _INCOMING / name
        if not (came / CONFIG_NAME).is_file() or not (came / MODEL_NAME).is_file():
            raise DataError(f"The upload of '{name}' is not whole: it needs {CONFIG_NAME} and {MODEL_NAME}.")
        (self.folder / UPLOADS).mkdir(exist_ok=True)
        number = 1 + max((int(p.name.rpartition("@")[2]) for p in (self.folder / UPLOADS).glob(f"{name}@*")), default=0)
        place = self.folder / UPLOADS / f"{name}@{number}"
        os.rename(came, place)
        try:
            registry.load(name, place, replace=replace, private=True)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        self.forget(name, keep=place)

    def forget(self, name: str, *, keep: Path | None = None) -> None:
        """Removes the uploads of a name; what is in memory stays as long as it is used."""
        for place in (self.folder / UPLOADS).glob(f"{name}@*"):
            if place != keep:
                shutil.rmtree(place, ignore_errors=True)
