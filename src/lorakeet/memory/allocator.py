"""What the C library's memory allocator holds beside the tensors, and how to make it hold less.

glibc serves pieces of less than 32 MiB from a heap that it grows and cuts, and a freed piece between two used ones stays with
the process: torch asks for aligned pieces, which glibc cuts from larger ones, so that a freed piece seldom fits the next tensor
of its size. Larger pieces are mapped one by one and go back to the system when they are freed.
"""

from __future__ import annotations

import ctypes
import math
import platform

from lorakeet.kernels.cpu.workspace import WORKSPACES

LARGEST_HEAP_PIECE = 32 << 20  # bytes; glibc raises its threshold up to this as pieces are freed (mallopt(3))
SLACK = 0.36  # of the tensors that come and go on the heap, at their peak; benchmarks/plan_accuracy.py measures it
SMALL_SLACK = 24 << 20  # bytes: the heap's free top and Python's own growth during a run
_THRESHOLD = 1 << 20  # bytes of the smallest piece that `return_freed_memory` has mapped
_NEVER = (1 << 31) - 1  # bytes at the heap's top beyond which it is cut
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def slack(heap: int) -> int:
    """Bytes to count beside `heap` bytes of tensors on the heap."""
    return math.ceil(heap * SLACK) + SMALL_SLACK


def return_freed_memory() -> bool:
    """Has every tensor of 1 MiB or more go back to the system as soon as it is freed; whether the C library takes the order.

    The process then holds what its tensors take, and nothing beside; the pages of each new tensor have to be cleared again,
    which costs a small model about a fifth of its speed. Only glibc has the setting, and it stays until the process ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    WORKSPACES.keeps = False
    library = ctypes.CDLL(None)
    return all(library.mallopt(ctypes.c_int(name), ctypes.c_int(_THRESHOLD)) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def keep_freed_memory() -> bool:
    """Has pieces of up to 32 MiB come from the heap, whose free top stays; whether the C library takes the order (glibc).

    Left to itself, glibc maps the first pieces of each size and cuts the heap whenever a step's activations are freed, and the
    system clears every page again in the next step. The process holds no more for it than it did at its peak.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library, wanted = ctypes.CDLL(None), {_M_MMAP_THRESHOLD: LARGEST_HEAP_PIECE, _M_TRIM_THRESHOLD: _NEVER}
    return all(library.mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in wanted.items())


def release_free_memory() -> bool:
    """Has what the heap keeps of freed tensors go back to the system now, if the C library can (glibc), and what blocks no longer
    keep; whether it could.

    Before training, what reading rows and weights has left does not lie between the tensors of the steps. Between training and
    judging, what a step took is not held beside the models that judging compares.
    """
    WORKSPACES.release()
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0)))
