"""A process whose memory only grows by what a test does: the garbage of earlier tests is gone, and free heap is the system's."""

from __future__ import annotations

import gc

from lorakeet.memory.allocator import release_free_memory
from lorakeet.memory.measure import reset_peak, resident_bytes


def settled_bytes() -> int:
    """Resident bytes after a garbage collection, with the free heap returned; the peak starts anew where the system allows it.

    Without it a collection that happens meanwhile frees what other tests left, and the growth that is measured is too small.
    """
    gc.collect()
    release_free_memory()
    reset_peak()
    return resident_bytes()
