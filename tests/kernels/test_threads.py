"""Threads that compute by themselves, beside one that computes with all cores; each case in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from lorakeet.kernels import threads
from lorakeet.kernels.threads import can_compute_alone, compute_alone, compute_with

T = TypeVar("T")

COUNTED = """
import os, threading, time, torch
from lorakeet.kernels.threads import compute_alone, compute_with

def tasks():
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.ones(1 << 20).add_(1).sum()  # torch's own threads
    x = torch.ones(512, 512)
    x @ x  # MKL's, where torch has it
    x.bfloat16() @ x.bfloat16()  # oneDNN's

compute_with(3)
before = tasks()
compute()
team = tasks() - before
compute_alone()
ended = tasks() - before
compute()
alone = tasks() - before
found = []

def engine():
    compute_with(2)
    compute()
    found.append((torch.get_num_threads(), tasks() - before))

for target in (engine, lambda: (compute_alone(), compute(), found.append((torch.get_num_threads(), tasks() - before)))):
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    until = time.monotonic() + 10
    while tasks() > before and time.monotonic() < until:  # a thread that has ended is seen for a moment
        time.sleep(0.01)
print(team, ended, alone, torch.get_num_threads(), found)
"""


def in_a_thread(function: Callable[[], T]) -> T:
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc, which this system has not")
@pytest.mark.skipif(not can_compute_alone(), reason="torch's OpenMP cannot end a team here")
def test_a_team_ends_and_others_stay() -> None:
    answer = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True, timeout=120).stdout
    # Two threads beside the first; none; none again. The engine: its thread and another one; then a thread by itself.
    assert answer.split("\n")[0] == "2 0 0 1 [(2, 2), (1, 1)]"


def test_a_thread_by_itself_changes_nothing_for_others() -> None:
    before = torch.get_num_threads()

    def alone() -> int:
        compute_alone()
        return torch.get_num_threads()

    assert in_a_thread(alone) == 1
    assert torch.get_num_threads() == before
    if can_compute_alone():
        assert in_a_thread(torch.get_num_threads) == before, "nor for those that come later"


def test_an_openmp_that_ends_all_teams_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        omp_set_num_threads = omp_pause_resource_all = kmp_get_blocktime = staticmethod(lambda *_: 0)

    for library, able in ((Library, False), (type("Gnu", (), {"omp_set_num_threads": 0, "omp_pause_resource_all": 0}), True)):
        monkeypatch.setattr(threads.ctypes, "CDLL", lambda _, found=library: found)
        assert (threads._openmp.__wrapped__() is not None) is able


def test_without_such_an_openmp_torch_sets_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    before = torch.get_num_threads()
    try:
        compute_with(2)
        assert not can_compute_alone() and torch.get_num_threads() == 2
        compute_alone()
        assert torch.get_num_threads() == 1
    finally:
        compute_with(before)
