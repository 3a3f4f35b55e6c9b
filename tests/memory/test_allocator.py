"""glibc told to give back what is freed, in a process of its own, since the order cannot be taken back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lorakeet.memory.allocator import SMALL_SLACK, slack

PROGRAM = """
import torch
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.measure import resident_bytes
warm = [torch.ones(1 << 20) for _ in range(2)]
{order}
kept, freed = [], []
before = resident_bytes()
for _ in range(40):
    freed.append(torch.ones(1 << 20))
    kept.append(torch.ones(100))
    if len(freed) == 20:
        del freed[::2]
held = resident_bytes()
del freed
print(before, held, resident_bytes())
"""


def held(order: str) -> tuple[int, int, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(order=order)], capture_output=True, text=True, check=True)
    before, most, after = map(int, done.stdout.split())
    return before, most, after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_tensors_leave_the_process_at_once() -> None:
    before, most, after = held("assert return_freed_memory()")
    assert most - before > 30 << 20, "ten tensors of 4 MiB are alive"
    assert after - before < 8 << 20


FAULTS = """
import resource
import torch
from lorakeet.memory.allocator import keep_freed_memory
{order}
def step():
    return [torch.ones(3 << 18) for _ in range(40)]
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_kept_memory_is_not_cleared_by_the_system_in_every_step() -> None:
    usual, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(order=order)], capture_output=True, text=True, check=True).stdout)
        for order in ("", "assert keep_freed_memory()")
    )
    assert usual > 10_000, "glibc cuts its heap by itself; if it no longer does, the order is not needed"
    assert kept < 500


def test_slack_grows_with_what_is_on_the_heap() -> None:
    assert slack(0) == SMALL_SLACK
    assert slack(2 << 30) - slack(1 << 30) > 0.2 * (1 << 30)


HEAP = """
import torch
from lorakeet.memory.allocator import release_free_memory
from lorakeet.memory.measure import resident_bytes
pieces = [torch.ones(32 << 10) for _ in range(800)]
kept = pieces[::8]
held = resident_bytes()
del pieces
before = resident_bytes()
assert release_free_memory()
print(held, before, resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can")
def test_free_pieces_between_used_ones_can_be_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True)
    held, before, after = map(int, done.stdout.split())
    assert held - after > 60 << 20, "700 of 800 pieces of 128 KiB are free"
    assert before - after > 0
