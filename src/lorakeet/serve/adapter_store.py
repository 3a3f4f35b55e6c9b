"""The folder of a server's uploaded adapters and its list of names, consistent even if the server is killed.

Files of different uploaders arrive in different folders, so that two uploads of one name never mix; they are loaded one after
another.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakeet.disk import flush, flush_folder
from lorakeet.errors import ConfigError, DataError, LorakeetError
from lorakeet.formats.files.digest import sha256_of
from lorakeet.formats.files.json_object import read_object
from lorakeet.formats.files.safetensors_file import save_text
from lorakeet.formats.peft.peft import MODEL_NAME
from lorakeet.formats.peft.peft_config import CONFIG_NAME
from lorakeet.serve.load_places import UPLOADS
from lorakeet.serve.model_names import check_name
from lorakeet.serve.probe import CERTIFICATE, Probe
from lorakeet.serve.registry import Registry
from lorakeet.serve.upload_space import MOST_UPLOADED, UploadSpace

LIST = "registry.json"
_INCOMING = ".incoming"
ACCEPTED = (CONFIG_NAME, MODEL_NAME, CERTIFICATE)  # the files of an upload; no pickle, no code


class AdapterStore:
    """Uploads and the list of names of one registry."""

    def __init__(self, folder: Path, most: int = MOST_UPLOADED) -> None:
        """`most`: bytes of all uploads."""
        self.folder = folder
        self._lock = threading.Lock()  # of the list
        self._changing = threading.Lock()  # of the uploads, never while one is read
        self._reading: set[Path] = set()  # uploads that are looked at
        self._restoring = False
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / _INCOMING, ignore_errors=True)  # unfinished by a killed server
        self.space = UploadSpace(folder / UPLOADS, folder / _INCOMING, most)
        path = self.folder / LIST
        found: dict[str, Any] = {}
        if path.is_file():
            found = read_object(path, expected="the list of adapters that a server wrote").get("adapters", {})
        if not isinstance(found, dict):
            raise DataError(f"{path} has no object of adapters by name; put back the file that the server wrote, or remove it.")
        self._absent = found  # entries of the list that are not served now

    def remember(self, registry: Registry) -> None:
        """Writes the list of names, whole or not at all: a killed server restarts with the last state or the one before."""
        if self._restoring:
            return
        with self._lock:
            entries = {name: entry for name, entry in self._absent.items() if name not in registry.names}
            absent = dict(entries)
            for version in registry.versions:
                probe = None if version.probe is None else version.probe.to_text()
                path, digest = str(version.source.path.resolve()), version.source.digest
                entries[version.name] = {"path": path, "digest": digest, "pinned": version.pinned, "probe": probe}
            save_text(self.folder / LIST, json.dumps({"adapters": entries}, indent=1, ensure_ascii=False) + "\n")
            self._absent = absent

    def restore(self, registry: Registry, say: Callable[[str], None]) -> None:
        """Registers the adapters of the list, then all others in the folder; `say` gets those that cannot be served.

        Names that are registered already are skipped. An adapter that cannot be served, because its disk is missing or the base
        is another, stays in the list.
        """
        self._restoring = True
        try:
            for name, entry in self._absent.items():
                if name in registry.names:
                    continue
                try:
                    probe = Probe.from_text(entry["probe"], str(self.folder / LIST)) if entry["probe"] else None
                    pinned, digest = bool(entry["pinned"]), str(entry["digest"])
                    path = Path(entry["path"])
                    private = path.parent == (self.folder / UPLOADS).resolve()
                    registry.register(name, path, pinned=pinned, probe=probe, digest=digest, private=private)
                except (LorakeetError, OSError, LookupError, TypeError, ValueError) as error:
                    said = str(error) if isinstance(error, (LorakeetError, OSError)) else f"its entry is damaged ({error!r})."
                    say(f"'{name}' is not served: {said} It stays in {self.folder / LIST} until it is unloaded.")
            for path in sorted(self.folder.iterdir()):
                name = path.name.removesuffix(path.suffix) if path.is_file() else path.name
                if path.name in (LIST, UPLOADS) or path.name.startswith(".") or name in registry.names:
                    continue
                try:
                    registry.register(name, path)
                except (LorakeetError, OSError) as error:
                    say(f"{path.name} is not served: {error}")
        finally:
            self._restoring = False
        self.remember(registry)

    def forget(self, name: str, registry: Registry) -> bool:
        """Removes from the list a name that could not be served at the start; False if there is none."""
        with self._lock:
            entry = self._absent.pop(name, None)
        if entry is None:
            return False
        try:
            self.tidy(name, registry)
            self.remember(registry)
        except BaseException:
            with self._lock:
                self._absent[name] = entry  # the list still has it
            raise
        return True

    @contextmanager
    def incoming(self, name: str, file: str, uploader: str = "") -> Iterator[Path]:
        """Yields the path to write a file of an upload to; the file is accepted when the block ends without an error.

        Its bytes are counted with `space.grow` before they are written. ConfigError for an invalid name.
        """
        check_name(name)
        if file not in ACCEPTED:
            raise ConfigError(f"The file {file!r} is not taken; an upload is {', '.join(ACCEPTED)}.")
        part = self.folder / _INCOMING / f"{uuid.uuid4().hex}.part"
        part.parent.mkdir(exist_ok=True)
        stored = False
        try:
            yield part
            flush(part)
            place = self._incoming_folder(name, uploader)
            place.mkdir(parents=True, exist_ok=True)
            os.replace(part, place / file)
            stored = True
        finally:
            part.unlink(missing_ok=True)
            self.space.end(part, stored=stored)

    def accept(
        self, name: str, registry: Registry, *, replace: bool, uploader: str = "", digests: Mapping[str, Any] | None = None
    ) -> None:
        """Loads the upload of `name`; it is kept and visible only if every check passes. Errors as in Registry.load, and
        ConfigError if the list has another adapter of that name that is not served, unless `replace`.

        DataError unless the SHA-256 of each of its files is that of `digests`: files of two uploads never become one adapter.
        """
        check_name(name)
        with self._changing:
            if name in self._absent and name not in registry.names and not replace:
                raise ConfigError(
                    f"'{name}' is in the server's list, but could not be served when it started: its files are missing, or "
                    "fit another base. Unload it first, replace it, or take another name."
                )
            came = self._incoming_folder(name, uploader)
            if not (came / CONFIG_NAME).is_file() or not (came / MODEL_NAME).is_file():
                raise DataError(f"The upload of '{name}' is not whole: it needs {CONFIG_NAME} and {MODEL_NAME}.")
            (self.folder / UPLOADS).mkdir(exist_ok=True)
            number = 1 + max((int(p.name.rpartition("@")[2]) for p in self._uploads(name)), default=0)
            place = self.folder / UPLOADS / f"{name}@{number}"
            os.rename(came, place)
            self._reading.add(place)
        try:
            flush(place)
            flush_folder(place.parent)
            came_with = {path.name: sha256_of(path) for path in sorted(place.iterdir())}
            if digests is not None and digests != came_with:
                raise DataError(
                    f"The files of '{name}' are not those of sha256: {', '.join(came_with)} came, and at least one differs. "
                    "Send all files again, with an ?upload=ID of your own."
                )
            registry.load(name, place, replace=replace, private=True)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        finally:
            with self._changing:
                self._reading.discard(place)
        self.tidy(name, registry)

    def tidy(self, name: str, registry: Registry) -> None:
        """Removes the uploads of a name except the one that it points to; adapters in memory stay as long as they are used."""
        with self._changing:
            kept = self._reading | {version.source.path for version in registry.versions if version.name == name}
            for place in self._uploads(name):
                if place not in kept:
                    shutil.rmtree(place, ignore_errors=True)

    def _uploads(self, name: str) -> list[Path]:
        return list((self.folder / UPLOADS).glob(f"{name}@*"))

    def _incoming_folder(self, name: str, uploader: str) -> Path:
        """The folder of an uploader's files of `name`; `uploader` may be any text, so its hash is the folder's name."""
        return self.folder / _INCOMING / hashlib.sha256(uploader.encode()).hexdigest()[:16] / name
