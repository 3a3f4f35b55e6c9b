"""Computes a value in a forked process beside this one, where that is allowed.

It takes two cores, and a process with one thread that has not started CUDA: a fork of one with more threads may never end, and a
fork of one with CUDA cannot use a GPU.

    fork ──> the value, through a pipe
     │
     └─ goes on with what is to be computed beside it, then waits

Where it is not allowed, or the other process fails, the value is computed here: the same value, later. Whether there is a GPU is
asked in such a process too, where this one shall have forks that can use it.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from lorakeet.memory.remembered import passing_nothing_on

Value = TypeVar("Value")
_allowed: ContextVar[bool] = ContextVar("_allowed", default=False)


@contextmanager
def forks_allowed() -> Iterator[None]:
    """A context in which values may be computed by processes beside this one."""
    before = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(before)


def shares_cores() -> bool:
    """Whether values may be computed by processes beside this one: teams of threads of several processes wait for each other."""
    return _allowed.get()


@contextmanager
def computed_beside(compute: Callable[[], Value]) -> Iterator[Callable[[], Value]]:
    """A context in which `compute` is under way, where that is allowed; gives what waits for its value, which pickle must take.

    What `compute` raises is raised by the waiting, which then computes here. Leaving the context ends the other process.
    """
    if not _allowed.get() or cores_here() < 2 or threads_here() != 1 or _uses_cuda():
        yield compute
        return
    reading, writing = os.pipe()
    try:
        pid = os.fork()
    except OSError:  # no more processes are allowed
        os.close(reading)
        os.close(writing)
        yield compute
        return
    if pid == 0:
        os.close(reading)  # else it would write for ever once this process is gone
        _compute_there(compute, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:

        def wait() -> Value:
            data = pipe.read()
            try:
                found: tuple[Value] = pickle.loads(data)
            except (EOFError, pickle.UnpicklingError):  # nothing, or what a killed process had written
                return compute()
            return found[0]

        try:
            yield wait
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _compute_there(compute: Callable[[], Value], writing: int) -> None:
    """In the forked process, which ends here: writes the value, or nothing where it could not be computed."""
    try:
        with passing_nothing_on():
            data = pickle.dumps((compute(),), pickle.HIGHEST_PROTOCOL)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(data)
    finally:
        os._exit(0)


@functools.cache
def gpu_beside() -> bool:
    """Whether torch sees a GPU, as a forked process says: the forks of one that has asked CUDA itself cannot use a GPU.

    torch can ask NVIDIA's library instead (NVML), but asks CUDA where that is missing, or the device is a part of a GPU (MIG).
    """
    import torch

    if torch.accelerator.current_accelerator() is None:  # this torch was built for CPUs
        return False
    pid = os.fork()
    if pid == 0:
        found = True
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # CUDA also knows whether the driver is new enough
        try:
            found = torch.accelerator.is_available()
        finally:
            os._exit(0 if found else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 1  # one that was killed while it asked has something to ask


def _uses_cuda() -> bool:
    """Whether torch has started CUDA in this process. Imports no torch."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def cores_here() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_here() -> int | None:
    """The threads of this process, those of its libraries too; None where the system does not say."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else None
