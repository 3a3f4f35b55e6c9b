"""Deleted runs: moved into the studio's own folder, from where they can be restored, until they are deleted for good."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from lorakeet.disk import erase
from lorakeet.errors import ConfigError
from lorakeet.studio.jobs import Queue, read_lock
from lorakeet.studio.places import NotHere, Places

_MARK = "@"  # between the name and the time of its deletion


@dataclass(frozen=True)
class DeletedRun:
    """A run in the bin; `key` is the name of its folder there."""

    key: str
    name: str
    deleted: float  # seconds since 1970


def delete_run(places: Places, queue: Queue, name: str) -> DeletedRun:
    """Moves a run into the bin, whole. ConfigError while it runs or waits."""
    folder = places.run(name)
    job = queue.of_run(name)
    if (job is not None and job.state in ("running", "waiting")) or read_lock(folder / ".lock"):
        raise ConfigError(f"'{name}' runs or waits. Stop it first, then delete it.")
    key = f"{name}{_MARK}{time.time_ns()}"
    target = places.own / "deleted" / key
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(folder, target)
    return _deleted(target)


def restore_run(places: Places, key: str) -> str:
    """Moves a run out of the bin; returns its name. ConfigError if another run has its name by now."""
    found = _found(places, key)
    target = places.new_run(found.name)
    if target.exists():
        raise ConfigError(f"There is another run '{found.name}' now. Delete or rename that one first.")
    os.rename(places.own / "deleted" / key, target)
    return found.name


def erase_run(places: Places, key: str) -> None:
    """Deletes a run of the bin for good."""
    _found(places, key)
    erase(places.own / "deleted" / key)


def deleted_runs(places: Places) -> list[DeletedRun]:
    """What is in the bin, the newest first."""
    folders = [folder for folder in (places.own / "deleted").glob(f"*{_MARK}*") if folder.is_dir()]
    return sorted(map(_deleted, folders), key=lambda one: -one.deleted)


def _found(places: Places, key: str) -> DeletedRun:
    found = next((one for one in deleted_runs(places) if one.key == key), None)
    if found is None:
        raise NotHere(f"There is no deleted run '{key:.100}'. It may have been restored or deleted for good.")
    return found


def _deleted(folder: Path) -> DeletedRun:
    name, _, moment = folder.name.rpartition(_MARK)
    return DeletedRun(folder.name, name, int(moment) / 1e9 if moment.isdigit() else 0.0)
