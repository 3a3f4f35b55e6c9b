"""The cores that other programs leave to the engine."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from lorakeet.kernels.threads import compute_with
from lorakeet.serve.free_cores import INTERVAL, FreeCores, available, cores_for_the_engine, engine_cores, seconds
from tiny.proc import proc_file


class Machine:
    """A clock and what was computed, moved by hand."""

    def __init__(self) -> None:
        self.now = self.everybody = self.own = 0.0

    def go_on(self, passed: float, *, own: float, others: float) -> None:
        """So many seconds later, in which this process had `own` cores and the others had `others`."""
        self.now += passed
        self.everybody += (own + others) * passed
        self.own += own * passed

    def free(self, most: int, cores: int | None = None) -> FreeCores:
        return FreeCores(most, cores=cores or most, measure=lambda: (self.everybody, self.own), clock=lambda: self.now)


@pytest.mark.parametrize(
    ("most", "others", "expected"),
    [(2, 0.0, 2), (2, 0.2, 2), (2, 0.5, 1), (2, 1.0, 1), (2, 5.0, 1), (8, 1.2, 7), (8, 1.5, 6), (1, 1.0, 1)],
)
def test_cores_that_others_use_are_left_to_them(most: int, others: float, expected: int) -> None:
    machine = Machine()
    free = machine.free(most)
    machine.go_on(2 * INTERVAL, own=most - 1, others=others)
    assert free() == expected
    machine.go_on(INTERVAL, own=most, others=0.0)
    assert free() == most


def test_there_are_as_many_cores_as_this_process_may_use() -> None:
    assert 1 <= available() <= (os.cpu_count() or 1)
    assert FreeCores(1).cores == available() and FreeCores(10_000).cores == 10_000


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux tells what its cores do")
def test_what_this_process_computes_is_its_own_and_what_another_does_is_not() -> None:
    everybody, own = seconds()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    after, mine = seconds()
    assert mine - own >= 0.25 and after - everybody >= 0.25
    code = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    later, still_mine = seconds()
    assert later - after >= 0.4 and still_mine - mine < 0.3


def test_where_the_system_does_not_tell_all_cores_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    proc_file(monkeypatch, "/proc/stat", None)
    assert seconds() == (0.0, 0.0)
    assert FreeCores(4)() == 4


@pytest.mark.parametrize(
    ("cores", "given", "apart", "expected"),
    [(4, None, True, 4), (4, None, False, 3), (1, None, False, 1), (4, "4", False, 4), (2, "2", True, 2)],
)
def test_the_engine_has_every_core_where_others_can_compute_by_themselves(
    cores: int, given: str | None, apart: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: cores)
    monkeypatch.setattr("lorakeet.serve.free_cores.can_compute_alone", lambda: apart)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert engine_cores()() == expected


def test_whoever_answers_computes_by_itself() -> None:
    before = torch.get_num_threads()
    try:
        compute_with(2)
        with cores_for_the_engine():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        compute_with(before)
