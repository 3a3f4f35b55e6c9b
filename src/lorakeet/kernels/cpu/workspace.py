"""Memory for the library's kernels: aligned workspace, and what whole blocks save between their passes."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from functools import partial

import torch
from torch import Tensor

ALIGNED = 64  # bytes: alignment of a register's loads


def aligned_bytes(count: int) -> Tensor:
    """A uint8 tensor with at least `count` bytes from `address` on, on the heap."""
    return torch.empty(count + ALIGNED, dtype=torch.uint8)


def address(numbers: Tensor) -> ctypes.c_void_p:
    """The first aligned byte of a tensor."""
    return ctypes.c_void_p(-(-numbers.data_ptr() // ALIGNED) * ALIGNED)


class Workspaces:
    """Memory for what blocks save between their passes, allocated as a stack in its own address space.

    Backward passes free the pieces from the last one on, so that no holes remain, whatever the sizes. On the heap, small
    allocations between them outlive them or are cached by the C library for their size; a pass with other sizes then does not
    fit, and the heap grows (docs/log). A page belongs to the system until it is first written, and then to the process until
    `release`.
    """

    def __init__(self, space: int = 1 << 36) -> None:
        """At most `space` bytes of address space; pieces beyond it, or all where the system grants none, come from the heap."""
        self.space = space
        self.keeps = True  # whether pages of freed pieces are kept for the next ones
        self._pages: mmap.mmap | None = None
        self._taken: dict[int, int] = {}  # start and end of each piece
        self._pieces: dict[int, weakref.ref[memoryview]] = {}  # which report when they are freed
        self._reached = 0  # the farthest end since the last release: pages behind it are not in use
        self._lock = threading.Lock()  # not for `_gone`, which the garbage collector may call anywhere

    def take(self, count: int) -> Tensor:
        """`count` bytes, uint8 (count,), which are freed with the tensor."""
        with self._lock:
            start = self._first_gap(-(-count // ALIGNED) * ALIGNED)
            stop = start + -(-count // ALIGNED) * ALIGNED
            pages = self._mapped() if stop <= self.space else None
            if pages is None:
                return aligned_bytes(count)
            self._taken[start] = stop
            self._reached = max(self._reached, stop)
        piece = memoryview(pages)[start : start + count]
        self._pieces[start] = weakref.ref(piece, partial(self._gone, start))
        return torch.frombuffer(piece, dtype=torch.uint8)

    def release(self) -> None:
        """Returns the pages behind the last piece to the system."""
        with self._lock:
            end = max([*self._taken.values()], default=0)
            self._give_back(end, -(-self._reached // mmap.PAGESIZE) * mmap.PAGESIZE)
            self._reached = end

    def _first_gap(self, size: int) -> int:
        taken = self._taken.copy()  # pieces may be freed at any time
        end = max(taken.values(), default=0)
        if end == sum(taken.values()) - sum(taken):
            return end  # without gaps, as nearly always
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
        del self._taken[start]  # last: from here on another piece may use the memory

    def _give_back(self, start: int, stop: int) -> None:
        first, last = -(-start // mmap.PAGESIZE), stop // mmap.PAGESIZE
        if self._pages is not None and first < last:
            self._pages.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)

    @property
    def taken(self) -> int:
        """How many pieces are in use."""
        return len(self._taken)

    def _mapped(self) -> mmap.mmap | None:
        if self._pages is None and self.space:
            try:
                self._pages = mmap.mmap(-1, self.space, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
            except OSError:  # address space is limited
                self.space = 0
        return self._pages


_NO_RESERVE = 0x4000  # MAP_NORESERVE, which Python 3.11 has no name for: unwritten pages are not counted
WORKSPACES = Workspaces()
