"""Files and folders that appear at their path whole or not at all. Everything that is kept on a disk is written here.

    FOLDER/.NAME.<random>.partial/NAME   written · flushed · renamed to FOLDER/NAME · FOLDER flushed

The folder of the first path is new and its owner's alone. Its name cannot be guessed, so no link can wait there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path
from typing import BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LARGEST_READ = 1 << 29  # bytes of a file that is read whole; weights and rows are not
_KEPT = 150  # bytes of a name that its stage repeats; a name has at most 255
_EMPTY_SECONDS = 60  # an empty stage of this age has no owner


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields where to make the file or folder `path`; it is flushed and replaces `path` when the block ends without an error.

    The yielded path has the same name and lies in a new folder beside `path`. Nothing stays there after an error. OSError if the
    system refuses; a folder replaces only an empty one. Folders around `path` are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    stage = path.with_name(f"{_beginning(path)}{secrets.token_hex(8)}.partial")
    stage.mkdir(mode=0o700)
    try:
        with _held(stage):
            made = stage / path.name
            yield made
            for inner in sorted(made.rglob("*"), reverse=True):
                flush(inner)
            flush(made)
            os.replace(made, path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    flush_folder(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, which has the old content or the new one at any moment."""
    with written_whole(path) as made:
        write_new(made, data)


def write_new(path: Path, data: bytes) -> None:
    """Writes `data` to the new file `path` and syncs it to the disk. FileExistsError if anything is there, a link included."""
    with create(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def create(path: Path) -> BinaryIO:
    """Opens the new file `path` for writing. FileExistsError if anything is there, a link included."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def open_in_place(path: Path, *, append: bool = False) -> BinaryIO:
    """Opens the file `path`, new or old, to be changed where it is: without a buffer, and never through a link.

    With `append` all that is written goes to its end, wherever that is then. OSError for a link, and for anything but a file.
    """
    handle = os.open(path, append * os.O_APPEND | os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return os.fdopen(handle, "r+b", buffering=0)


def open_regular(path: Path, *, follow: bool = True) -> FileIO:
    """Opens a file to be read, without a buffer. OSError for what is no file: reading a pipe or a device may never end.

    Without `follow` OSError for a link, too.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "it is no file", str(path))
    return FileIO(handle, "rb")


def open_buffered(path: Path) -> BufferedReader:
    """As `open_regular`, with a buffer, in place of `path.open("rb")`."""
    return BufferedReader(open_regular(path))


def read_regular(path: Path, most: int = LARGEST_READ) -> bytes:
    """All of a file. OSError for what is no file, and for more than `most` bytes."""
    with open_buffered(path) as file:
        raw = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)  # Python allocates all that is requested
    if len(raw) > most:
        raise OSError(errno.EINVAL, f"it has more than {most:,} bytes", str(path))
    return raw


def flush(path: Path) -> None:
    """Syncs a file, or the entries of a folder, to the disk. OSError for a link."""
    _sync(path, os.O_NOFOLLOW)


def flush_folder(path: Path) -> None:
    """Syncs the entries of a folder, or of the one that a link names, to the disk."""
    _sync(path, os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def stage_in_use(stage: Path) -> bool:
    """True if a process has locked the folder `stage`: it writes there."""
    try:
        handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False  # no folder, or none of this user
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(handle)
    return False


def erase(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link without what it names; nothing if nothing is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _beginning(path: Path) -> str:
    return f".{path.name.encode('utf-8', 'surrogateescape')[:_KEPT].decode('utf-8', 'ignore')}."


@contextmanager
def _held(stage: Path) -> Iterator[bool]:
    """A context that locks a folder; false where the file system has no locks."""
    handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield _locked(handle, wait=True)
    finally:
        os.close(handle)


def _locked(handle: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _sweep(path: Path) -> None:
    """Removes the stages of `path` that a killed process left: folders of this user that no process has locked."""
    pattern = re.compile(re.escape(_beginning(path)) + r"[0-9a-f]{16}\.partial")
    with os.scandir(path.parent) as entries:
        found = [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
    for stage in found:
        try:
            handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # it has gone, or is another user's
        try:
            about = os.fstat(handle)
            ours = about.st_uid == os.geteuid() and _locked(handle, wait=False)
            if ours and (os.listdir(handle) or time.time() - about.st_mtime > _EMPTY_SECONDS):
                shutil.rmtree(stage, ignore_errors=True)
        finally:
            os.close(handle)
