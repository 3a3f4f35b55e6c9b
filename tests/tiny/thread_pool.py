"""torch's pool of threads in a forked process of a test."""

from __future__ import annotations

import sys


def renew_threads() -> None:
    """Makes the pool anew, before a forked process starts any thread.

    A fork has its parent's pool without the threads. torch replaces it at the first operator, but not safely once its number has
    been set: two threads that begin at once end in "Invalid thread pool". Of 300 forks with four threads 253 did. A new pool has
    threads, so nothing is computed beside such a process (memory/beside): the studio's forks do without, and set no number.
    """
    torch = sys.modules.get("torch")
    if torch is not None:  # which some tests forbid to import
        torch.set_num_threads(torch.get_num_threads())
