"""How much memory the process holds and held at most, as the system counts it: resident bytes, and CUDA's own count."""

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
    """Bytes of memory that the process holds now; where the system does not say (macOS), the most it ever held."""
    return _status("VmRSS") or _resource_peak()


def peak_bytes() -> int:
    """The most bytes the process has held at once, since it started or since `reset_peak` last succeeded."""
    return _status("VmHWM") or _resource_peak()


def reset_peak() -> bool:
    """Makes the present size the new peak; whether the system allowed it (Linux does, in most containers)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def cuda_peak_bytes() -> int:
    """The most bytes torch had allocated on all CUDA devices together; 0 without CUDA."""
    if not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))


class PeakMemory:
    """A context that measures the most memory held inside it: `bytes` (resident) and `cuda_bytes`.

    Where the system's own peak can be reset it is exact; otherwise a thread looks every `interval` seconds, and
    `sampled` says so: a spike shorter than the interval may then be missed. Within another one it begins anew, and the other has
    all of it.
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
        for outer in self._around:  # what the system and CUDA are about to forget
            outer.now()
            outer.cuda_bytes = max(outer.cuda_bytes, cuda_peak_bytes())
        for index in range(torch.cuda.device_count()):
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
        """The most resident bytes so far."""
        self.bytes = max(self.bytes, resident_bytes() if self.sampled else peak_bytes())
        return self.bytes

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self.bytes = max(self.bytes, resident_bytes())
        self.bytes = max(self.bytes, resident_bytes())


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes, or 0 where there is none."""
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
