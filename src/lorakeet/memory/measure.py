"""Measures the memory of the process, now and at its peak: resident bytes, and CUDA's own count."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from typing import ClassVar

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Returns the resident bytes of the process; where the system does not report them (macOS), its peak."""
    return _status("VmRSS") or _resource_peak()


def peak_bytes() -> int:
    """Returns the peak of resident bytes since the process started or `reset_peak` last succeeded."""
    return _status("VmHWM") or _resource_peak()


def reset_peak() -> bool:
    """Resets the peak to the present size; True if the system allows it (Linux does, in most containers)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def cuda_peak_bytes() -> int:
    """Returns the peak of torch's allocated bytes, summed over CUDA devices; 0 without CUDA."""
    if not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))


class PeakMemory:
    """A context that measures the peak of memory inside it: `bytes` (resident) and `cuda_bytes`.

    It is exact where the system's own peak can be reset. Otherwise `sampled` is True: a thread samples every `interval`
    seconds and may miss a shorter spike. Contexts nest: the outer one includes the peak of the inner one.
    """

    _around: ClassVar[list[PeakMemory]] = []  # those that are measuring, the outermost first

    def __init__(self, *, interval: float = 0.05, sample: bool | None = None) -> None:
        self.interval = interval
        self.bytes = 0
        self.cuda_bytes = 0
        self.sampled = bool(sample)
        self._may_reset = not sample
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        for outer in self._around:  # before the counters of the system and of CUDA are reset
            outer.now()
            outer.cuda_bytes = max(outer.cuda_bytes, cuda_peak_bytes())
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            for index in range(torch.cuda.device_count()):  # before, there are no counters, and torch raises
                torch.cuda.reset_peak_memory_stats(index)
        self.bytes = resident_bytes()
        self._around.append(self)
        if not (self._may_reset and reset_peak()):
            self.sampled = True
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._around.remove(self)
        if self._thread is None:
            self.bytes = max(self.bytes, peak_bytes())
        else:
            self._done.set()
            self._thread.join()
        self.cuda_bytes = max(self.cuda_bytes, cuda_peak_bytes())

    def now(self) -> int:
        """Returns the peak of resident bytes so far."""
        self.bytes = max(self.bytes, resident_bytes() if self.sampled else peak_bytes())
        return self.bytes

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self.bytes = max(self.bytes, resident_bytes())
        self.bytes = max(self.bytes, resident_bytes())


def _status(field: str) -> int:
    """Returns a field of /proc/self/status in bytes; 0 without it."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _resource_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
