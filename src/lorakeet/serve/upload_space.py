"""The bytes that uploads take on the server's disk: counted before they are written, refused beyond a limit."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lorakeet.disk import erase
from lorakeet.errors import EnvironmentProblem
from lorakeet.evaluate.wording import bytes_text

MOST_UPLOADED = 64 << 30  # bytes
FORGOTTEN = 3600.0  # seconds after which files that were sent and never accepted are removed, where space is needed
_BLOCK = 4096  # bytes of the smallest file on a disk


class UploadsFull(EnvironmentProblem):
    """A further upload would exceed the limit on the bytes of all uploads."""


class UploadSpace:
    """Uploads in the folder `kept`, and those on their way in `incoming`: together at most `most` bytes.

    Each file counts whole blocks of 4,096 bytes, so that a million empty ones count too. What was removed is seen as soon as
    space is needed: then the folders are counted anew.
    """

    def __init__(self, kept: Path, incoming: Path, most: int = MOST_UPLOADED) -> None:
        self.most = most
        self._kept, self._incoming = kept, incoming
        self._lock = threading.Lock()
        self._writing: dict[Path, int] = {}  # bytes of the files that are being written
        self._stored = self._measured()

    @property
    def used(self) -> int:
        """Bytes of all uploads, at rest and on their way."""
        with self._lock:
            self._stored = self._measured()
            return self._total()

    def grow(self, part: Path, count: int) -> None:
        """Counts `count` bytes that are about to be written to `part`. UploadsFull, without counting them, if they do not fit."""
        with self._lock:
            before = self._writing.get(part)
            self._writing[part] = (before or 0) + count
            if self._total() <= self.most:
                return
            self._remove_forgotten()
            self._stored = self._measured()
            if self._total() <= self.most:
                return
            if before is None:
                del self._writing[part]
            else:
                self._writing[part] = before
        raise UploadsFull(
            f"The uploads of this server may take {bytes_text(self.most)} in all (--uploads-total), and this one exceeds it. "
            "Remove adapters with DELETE /v1/adapters/NAME, or start the server with a larger --uploads-total."
        )

    def end(self, part: Path, *, stored: bool) -> None:
        """Ends the counting of a file that is written: it is `stored`, or removed."""
        with self._lock:
            count = self._writing.pop(part, 0)
            self._stored += _blocks(count) if stored else 0

    def _total(self) -> int:
        return self._stored + sum(map(_blocks, self._writing.values()))

    def _measured(self) -> int:
        """Bytes of the files at rest, as they are on the disk now."""
        return sum(_blocks(size) for folder in (self._kept, self._incoming) for size in self._sizes(folder))

    def _sizes(self, folder: Path) -> Iterator[int]:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from self._sizes(Path(entry.path))
                elif Path(entry.path) not in self._writing:
                    with contextlib.suppress(OSError):  # it has gone
                        yield entry.stat(follow_symlinks=False).st_size

    def _remove_forgotten(self) -> None:
        """Removes what came in long ago and was never accepted: INCOMING/UPLOADER/NAME."""
        for place in self._incoming.glob("*/*"):
            with contextlib.suppress(OSError):
                if place.is_dir() and time.time() - place.stat().st_mtime > FORGOTTEN:
                    erase(place)


def _blocks(size: int) -> int:
    return max(1, -(-size // _BLOCK)) * _BLOCK
