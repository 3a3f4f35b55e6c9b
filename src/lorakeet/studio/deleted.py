"""Deleted runs: moved into the studio's own folder, from where they can be restored, until they are deleted for good."""

from __future__ import annotations

import fcntl
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lorakeet.disk import erase, open_in_place
from lorakeet.errors import ConfigError
from lorakeet.studio.jobs import Job, Queue
from lorakeet.studio.places import NotHere, Places, given_run_id, run_id

_GONE = ".gone-"  # before the name of a folder that is being erased
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
    target = places.own / "deleted" / f"{name}{_MARK}{time.time_ns()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with queue.alone():  # nothing is started meanwhile
        for job, state in queue.going():
            if job.run == name:
                raise ConfigError(f"'{name}' runs or waits. Stop it first, then delete it.")
            if job.names(folder):
                raise ConfigError(f"'{name}' is used by a job that is {state}: {job.title}. Stop or close that first.")
        with _locked(folder / ".lock", name):
            _bind_logs(places, queue, name, given_run_id(folder))
            os.rename(folder, target)
    return _deleted(target)


def _bind_logs(places: Places, queue: Queue, name: str, found: str) -> None:
    """Binds the jobs that made the run, before its folder was there. One with a file of the user's is never bound by its time."""
    for job in jobs_of_run(places, queue, name) if found else []:
        if name not in job.runs and job.kept is None:
            with suppress(OSError):  # it stays, when the run is erased
                queue.bind(job, name, found)


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """A context with the lock of a run, which no process that trains it can have meanwhile."""
    with open_in_place(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"'{name}' runs or waits. Stop it first, then delete it.") from None
        yield


def restore_run(places: Places, queue: Queue, key: str) -> str:
    """Moves a run out of the bin; returns its name. ConfigError if another run has its name by now."""
    found = _found(places, key)
    target = places.new_run(found.name)
    with queue.alone():
        if target.exists() or any(job.run == found.name for job, _ in queue.going()):
            raise ConfigError(f"There is another run '{found.name}' now. Delete or rename that one first.")
        _renamed(places, key, target)
    return found.name


def erase_run(places: Places, queue: Queue, key: str) -> None:
    """Deletes a run of the bin for good, with the jobs of `jobs_erased_with` and the files of answers in them."""
    found = _found(places, key)
    jobs = jobs_erased_with(places, queue, found)
    gone = places.own / "deleted" / f"{_GONE}{secrets.token_hex(8)}"
    _renamed(places, key, gone)  # of two tabs, one erases it or restores it
    for job in jobs:
        queue.forget(job)
    erase(gone)


def erase_the_rest(places: Places) -> None:
    """Removes what a studio that was killed had started to erase."""
    for folder in (places.own / "deleted").glob(f"{_GONE}*"):
        shutil.rmtree(folder, ignore_errors=True)  # another studio may do so at the same time


def _renamed(places: Places, key: str, target: Path) -> None:
    try:
        os.rename(places.own / "deleted" / key, target)
    except FileNotFoundError:
        raise _not_there(key) from None


def jobs_of_run(places: Places, queue: Queue, name: str, deleted: DeletedRun | None = None) -> list[Job]:
    """The jobs that made, measured or used the run `name`, the newest first; or those of a `deleted` run.

    A job belongs to the folder whose run_id it has. Its time decides where it has none, or that folder is no more. Then a run of
    the bin has the jobs that were made before its deletion.
    """
    ends = sorted(one.deleted for one in deleted_runs(places) if one.name == name)
    until = math.inf if deleted is None else deleted.deleted
    since = max((end for end in ends if end < until), default=0.0)
    folder = str(places.runs / name)
    own, known = run_id(_folder(places, name, deleted)), _run_ids(places, name)
    jobs = [job for job in reversed(queue.jobs()) if job.run == name or any(word.endswith(folder) for word in job.words)]
    bound = {job.name: job.runs.get(name) for job in jobs}
    return [job for job in jobs if (bound[job.name] == own if bound[job.name] in known else since < job.made < until)]


def jobs_erased_with(places: Places, queue: Queue, deleted: DeletedRun) -> list[Job]:
    """The jobs that are surely of this run of the bin alone: they have its run_id, and no other folder of its name has it."""
    own = run_id(_folder(places, deleted.name, deleted))
    if _run_ids(places, deleted.name).count(own) != 1:  # a copy has the same
        return []
    return [job for job in jobs_of_run(places, queue, deleted.name, deleted) if job.runs.get(deleted.name) == own]


def _folder(places: Places, name: str, deleted: DeletedRun | None) -> Path:
    return places.runs / name if deleted is None else places.own / "deleted" / deleted.key


def _run_ids(places: Places, name: str) -> list[str]:
    """The run_id of each folder of this name, in the bin or not."""
    folders = [_folder(places, name, one) for one in (None, *deleted_runs(places)) if one is None or one.name == name]
    return [found for found in map(run_id, folders) if found]


def deleted_runs(places: Places) -> list[DeletedRun]:
    """What is in the bin, the newest first."""
    folders = [folder for folder in (places.own / "deleted").glob(f"*{_MARK}*") if folder.is_dir()]
    return sorted(map(_deleted, folders), key=lambda one: -one.deleted)


def _found(places: Places, key: str) -> DeletedRun:
    found = next((one for one in deleted_runs(places) if one.key == key), None)
    if found is None:
        raise _not_there(key)
    return found


def _not_there(key: str) -> NotHere:
    return NotHere(f"There is no deleted run '{key:.100}'. It may have been restored or deleted for good.")


def _deleted(folder: Path) -> DeletedRun:
    name, _, moment = folder.name.rpartition(_MARK)
    return DeletedRun(folder.name, name, int(moment) / 1e9 if moment.isdecimal() else 0.0)
