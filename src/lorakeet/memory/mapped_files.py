"""Releases the pages of a file that another library has mapped, while that library reads them.

A mapped file's pages count as memory of the process once they are read, and stay until the system needs memory. They are copies
of the file: after a release, they are read again from the system's cache or from disk.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/maps")
# Advice of madvise(2). DONTNEED clears memory without a file behind it; PAGEOUT loses nothing, but a file's pages leave the
# system's cache too.
_DONTNEED, _PAGEOUT = 4, 21


def release_pages(path: Path, *, stays: bool = False) -> int:
    """Releases the pages of every read-only mapping of the file `path` in this process; returns the bytes of these mappings.

    A library may remove its mapping and map other memory there at any time, so pages are paged out, which is safe for any
    memory; the next access may read the disk. With `stays`, a promise that no such mapping is removed meanwhile, they stay in
    the system's cache. Returns 0 where the system does not list mappings (Linux does) or cannot page out (Linux before 5.4).
    Pages of a file that this user may not write to stay.
    """
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    library, wanted, total = ctypes.CDLL(None), str(path.resolve()), 0
    advice = ctypes.c_int(_DONTNEED if stays else _PAGEOUT)
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == wanted and fields[1] == "r--s":
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            if library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice) == 0:
                total += end - begin
    return total


@contextmanager
def releasing_pages(path: Path, *, interval: float = 0.02, stays: bool = False) -> Iterator[None]:
    """A context in which a thread releases the mapped pages of `path` every `interval` seconds.

    With `stays` no mapping of it may be removed within the context (`release_pages`).
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            release_pages(path, stays=stays)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        release_pages(path, stays=stays)
