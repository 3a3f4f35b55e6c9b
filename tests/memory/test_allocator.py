"""glibc told to give back what is freed, in a process of its own, since the order cannot be taken back."""

from __future__ import annotations

import platform

import pytest

from lorakeet.memory.allocator import SMALL_SLACK, slack
from tiny.one_import import answers

IMPORTS = """
import resource
import torch
from lorakeet.memory.allocator import keep_freed_memory, release_free_memory, return_freed_memory
from lorakeet.memory.measure import resident_bytes
"""
RETURNED = """
warm = [torch.ones(1 << 20) for _ in range(2)]
assert return_freed_memory()
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


FAULTS = """
{order}
def step():
    return [torch.ones(3 << 18) for _ in range(40)]
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


HEAP = """
pieces = [torch.ones(32 << 10) for _ in range(800)]
kept = pieces[::8]
held = resident_bytes()
del pieces
before = resident_bytes()
assert release_free_memory()
print(held, before, resident_bytes())
"""


@pytest.fixture(scope="module")
def printed() -> list[list[int]]:
    """The numbers of all programs."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc has these settings")
    codes = [RETURNED, FAULTS.format(order=""), FAULTS.format(order="assert keep_freed_memory()"), HEAP]
    return [[int(number) for number in line.split()] for line in answers(IMPORTS, codes)]


def test_freed_tensors_leave_the_process_at_once(printed: list[list[int]]) -> None:
    before, most, after = printed[0]
    assert 30 << 20 < most - before < 60 << 20, "ten tensors of 4 MiB are alive; glibc by itself keeps the freed ones too"
    assert after - before < 8 << 20


def test_kept_memory_is_not_cleared_by_the_system_in_every_step(printed: list[list[int]]) -> None:
    [usual], [kept] = printed[1:3]
    assert usual > 10_000, "glibc cuts its heap by itself; if it no longer does, the order is not needed"
    assert kept < 500


def test_slack_grows_with_what_is_on_the_heap() -> None:
    assert slack(0) == SMALL_SLACK
    assert slack(2 << 30) - slack(1 << 30) > 0.2 * (1 << 30)


def test_free_pieces_between_used_ones_can_be_given_back(printed: list[list[int]]) -> None:
    held, before, after = printed[3]
    assert held - after > 60 << 20, "700 of 800 pieces of 128 KiB are free"
    assert before - after > 0
