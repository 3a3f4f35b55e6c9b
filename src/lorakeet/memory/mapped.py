"""The pages of a file that another library has mapped, given back to the system while that library goes through them.

A mapped file's pages count as memory of the process as soon as they are read, and stay until the system needs room. They are
copies of what is on disk: given back, the next look finds them in the system's cache, or on disk.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # of madvise(2): for a shared mapping of a file, only that the process lets go of the pages


def give_back(path: Path) -> int:
    """Gives back the pages of every read-only mapping of the file `path` in this process; the bytes of these mappings.

    0 where the system does not tell what is mapped (it does on Linux).
    """
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    library, wanted, total = ctypes.CDLL(None), str(path.resolve()), 0
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == wanted and fields[1] == "r--s":
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(_DONTNEED))
            total += end - begin
    return total


@contextmanager
def giving_back(path: Path, *, interval: float = 0.02) -> Iterator[None]:
    """A context in which the mapped pages of `path` are given back every `interval` seconds, by a thread of its own."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            give_back(path)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        give_back(path)
