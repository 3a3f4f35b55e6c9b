"""How many cores each thread computes with: OpenMP counts the teams of the whole process.

torch's products run in OpenMP teams, one for each thread that computes. GNU's OpenMP lets a team spin while it waits for its next
product as long as all teams together have no more threads than there are cores, and puts them to sleep otherwise. On 2 cores,
beside the team of another thread, each product then starts 50 to 80 µs late: as long as it takes (docs/log).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_HARD = 2  # omp_pause_hard of OpenMP 5.0: frees everything that a team keeps between two products


def compute_with(threads: int) -> None:
    """Sets the team of the calling thread to `threads`; threads that start to compute later use as many."""
    torch.set_num_threads(threads)
    _mkl_takes(0)  # as many


def compute_alone() -> None:
    """Ends the team of the calling thread, which computes by itself from now on. Other threads keep theirs.

    Where a team cannot be ended (`can_compute_alone`), its threads stay, and are counted.
    """
    torch.get_num_threads()  # torch sets a thread's number of threads when it first computes: no later than here
    library = _openmp()
    if library is None:
        torch.set_num_threads(1)
        return
    library.omp_set_num_threads(ctypes.c_int(1))  # torch's own call would change other threads too
    _mkl_takes(1)
    library.omp_pause_resource_all(ctypes.c_int(_HARD))


def can_compute_alone() -> bool:
    """True if torch's OpenMP can end the team of one thread: GNU's, of GCC 9 or later."""
    return _openmp() is not None


@cache
def _openmp() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    if hasattr(library, "kmp_get_blocktime"):  # LLVM's and Intel's would end the teams of all threads
        return None
    return library if all(hasattr(library, name) for name in ("omp_set_num_threads", "omp_pause_resource_all")) else None


def _mkl_takes(threads: int) -> None:
    """Sets MKL's threads for the calling thread (MKL multiplies fp32 for torch), whatever OpenMP's own number; 0 for torch's
    number of the whole process."""
    call = _mkl()
    if call is not None:
        call(ctypes.c_int(threads))


@cache
def _mkl() -> Callable[[ctypes.c_int], object] | None:
    """MKL's call for one thread's number, if torch is built with MKL; it is in torch's own library."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.CDLL(str(path)).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
