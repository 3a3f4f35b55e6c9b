"""Peak memory is seen, by the system's own count and by sampling."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lorakeet.memory import measure
from lorakeet.memory.measure import PeakMemory, peak_bytes, reset_peak, resident_bytes
from tiny.proc import proc_file
from tiny.settled import settled_bytes

MEGABYTE = 1 << 20


def use(megabytes: int) -> None:
    """Touches that much memory, holds it long enough to be sampled, and gives it back."""
    block = np.ones(megabytes * MEGABYTE // 8)
    time.sleep(0.05)
    del block


@pytest.mark.parametrize("sample", [False, True])
def test_a_spike_is_seen_after_it_is_gone(sample: bool) -> None:
    before = settled_bytes()
    with PeakMemory(interval=0.005, sample=sample) as memory:
        use(200)
    assert memory.bytes - before > 150 * MEGABYTE
    assert memory.bytes >= memory.now() - 50 * MEGABYTE
    assert memory.sampled or not sample


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_an_earlier_spike_does_not_count() -> None:
    use(200)
    if not reset_peak():
        pytest.skip("this container does not allow the reset")
    assert peak_bytes() - resident_bytes() < 100 * MEGABYTE
    with PeakMemory() as memory:
        use(20)
    assert not memory.sampled
    assert memory.bytes < resident_bytes() + 120 * MEGABYTE


def test_one_within_another_begins_anew_and_the_other_has_all() -> None:
    with PeakMemory() as outer:
        use(200)
        with PeakMemory() as inner:
            use(20)
        use(20)
        assert outer.now() == outer.bytes
    if inner.sampled:
        pytest.skip("this container does not allow the reset")
    assert outer.bytes - inner.bytes > 100 * MEGABYTE


def test_what_cuda_forgets_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [0]
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(measure.torch.cuda, name, lambda: True)
    monkeypatch.setattr(measure.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(measure.torch.cuda, "max_memory_allocated", lambda _: peak[0])
    monkeypatch.setattr(measure.torch.cuda, "reset_peak_memory_stats", lambda _: peak.__setitem__(0, 0))
    with PeakMemory() as outer:
        peak[0] = 500
        with PeakMemory() as inner:
            peak[0] = 20
    assert (outer.cuda_bytes, inner.cuda_bytes) == (500, 20)


def test_without_permission_it_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "write_text", refuse)
    before = settled_bytes()
    with PeakMemory(interval=0.005) as memory:
        use(120)
    assert memory.sampled
    assert memory.bytes - before > 80 * MEGABYTE


def test_without_proc_the_system_call_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = resident_bytes()
    proc_file(monkeypatch, "/proc/self/status", None)
    assert resident_bytes() == peak_bytes()
    assert peak_bytes() > real / 2
