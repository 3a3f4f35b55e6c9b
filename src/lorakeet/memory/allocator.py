"""The overhead of the C library's memory allocator beside the tensors, and how to reduce it.

glibc allocates less than 32 MiB from a heap that grows and shrinks at its top, so that freed memory between two used pieces
stays with the process. torch requests aligned memory, which glibc cuts from larger pieces, so that a freed piece seldom fits the
next tensor of the same size. Larger tensors are mapped one by one and return to the system when they are freed.
"""

from __future__ import annotations

import ctypes
import math
import platform

from lorakeet.kernels.cpu.workspace import WORKSPACES

LARGEST_HEAP_PIECE = 32 << 20  # bytes; glibc raises its threshold up to this as pieces are freed (mallopt(3))
SLACK = 0.36  # of the peak of temporary tensors on the heap; benchmarks/plan_accuracy.py measures it
SMALL_SLACK = 24 << 20  # bytes: the heap's free top and Python's own growth during a run
_THRESHOLD = 1 << 20  # bytes from which `return_freed_memory` maps a tensor by itself
_NEVER = (1 << 31) - 1  # trim threshold in bytes that the heap's top never reaches
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def slack(heap: int) -> int:
    """Returns the overhead in bytes of `heap` bytes of tensors on the heap."""
    return math.ceil(heap * SLACK) + SMALL_SLACK


def return_freed_memory() -> bool:
    """Makes tensors of 1 MiB or more return to the system as soon as they are freed; True if the C library can (glibc).

    The process then uses no more than its tensors, but the system clears the pages of each new one, which makes a small model
    about a fifth slower. The setting lasts until the process ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    WORKSPACES.keeps = False
    library = ctypes.CDLL(None)
    return all(library.mallopt(ctypes.c_int(name), ctypes.c_int(_THRESHOLD)) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def keep_freed_memory() -> bool:
    """Allocates up to 32 MiB from the heap and never trims its top; True if the C library can (glibc).

    By default glibc maps the first tensors of each size and trims the heap whenever a step's activations are freed, and the
    system clears every page again in the next step. The process never uses more than its peak.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library, wanted = ctypes.CDLL(None), {_M_MMAP_THRESHOLD: LARGEST_HEAP_PIECE, _M_TRIM_THRESHOLD: _NEVER}
    return all(library.mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in wanted.items())


def release_free_memory() -> bool:
    """Returns freed memory of the heap, and buffers of C blocks that no longer need them, to the system; True if it can (glibc).

    Before training, so that leftovers of loading do not lie between the tensors of the steps; before the evaluation, so that the
    memory of a step does not add to that of the compared models.
    """
    WORKSPACES.release()
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0)))
