"""Memory that the library's kernels work in: aligned scratch, and what whole blocks keep between their passes."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from functools import partial

import torch
from torch import Tensor

ALIGNED = 64  # bytes: what a register's pieces begin at multiples of


def room(count: int) -> Tensor:
    """So many bytes from `address` on, uint8, of the heap."""
    return torch.empty(count + ALIGNED, dtype=torch.uint8)


def address(numbers: Tensor) -> ctypes.c_void_p:
    """The first byte in it at which a register's pieces may begin."""
    return ctypes.c_void_p(-(-numbers.data_ptr() // ALIGNED) * ALIGNED)


class Rooms:
    """Memory for what blocks keep between their passes, one piece behind the other, in address space of its own.

    Backward passes give the pieces back from the last one on, so that they leave no holes, whatever their sizes are. On the heap
    small pieces lie between them, which outlive them or which the C library holds for the next of their size: a pass of other
    sizes then finds its places too small, and the heap grows (docs/log.md). A page is the system's until it is written to for the
    first time, and stays with the process then, until `release`.
    """

    def __init__(self, space: int = 1 << 36) -> None:
        """At most `space` bytes, of which none is held; pieces beyond, and all where the system grants none, are the heap's."""
        self.space = space
        self.keeps = True  # pages of pieces that are gone, for the next ones
        self._pages: mmap.mmap | None = None
        self._taken: dict[int, int] = {}  # where each piece begins, and where it ends
        self._pieces: dict[int, weakref.ref[memoryview]] = {}  # which say when they are gone
        self._reached = 0  # the farthest end since the last release: no page behind it is held
        self._lock = threading.Lock()  # not for `_gone`, which may be called within, wherever Python collects what is gone

    def take(self, count: int) -> Tensor:
        """So many bytes (count,), uint8, which are free again when the tensor is gone."""
        with self._lock:
            start = self._first_gap(-(-count // ALIGNED) * ALIGNED)
            stop = start + -(-count // ALIGNED) * ALIGNED
            pages = self._mapped() if stop <= self.space else None
            if pages is None:
                return room(count)
            self._taken[start] = stop
            self._reached = max(self._reached, stop)
        piece = memoryview(pages)[start : start + count]
        self._pieces[start] = weakref.ref(piece, partial(self._gone, start))
        return torch.frombuffer(piece, dtype=torch.uint8)

    def release(self) -> None:
        """Gives the pages behind the last piece back to the system."""
        with self._lock:
            end = max([*self._taken.values()], default=0)
            self._give_back(end, -(-self._reached // mmap.PAGESIZE) * mmap.PAGESIZE)
            self._reached = end

    def _first_gap(self, size: int) -> int:
        taken = self._taken.copy()  # pieces may go at any time
        end = max(taken.values(), default=0)
        if end == sum(taken.values()) - sum(taken):
            return end  # one behind the other, as nearly always
        end = 0
        for start, stop in sorted(taken.items()):
            if start - end >= size:
                break
            end = stop
        return end

    def _gone(self, start: int, _: object) -> None:
        if not self.keeps:
            self._give_back(start, self._taken[start])
        del self._pieces[start]
        del self._taken[start]  # last: from now on the place may be somebody else's

    def _give_back(self, start: int, stop: int) -> None:
        first, last = -(-start // mmap.PAGESIZE), stop // mmap.PAGESIZE
        if self._pages is not None and first < last:
            self._pages.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)

    @property
    def taken(self) -> int:
        """How many pieces are."""
        return len(self._taken)

    def _mapped(self) -> mmap.mmap | None:
        if self._pages is None and self.space:
            try:
                self._pages = mmap.mmap(-1, self.space, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
            except OSError:  # as where address space is limited
                self.space = 0
        return self._pages


_NO_RESERVE = 0x4000  # MAP_NORESERVE, which Python 3.11 has no name for: what is not written to is not counted
ROOMS = Rooms()
