"""The memory settings: what a budget may look like."""

from __future__ import annotations

import pytest

from lorakeet.memory.spec import MemorySpec


def test_no_budget_is_none_and_a_budget_is_bytes() -> None:
    assert not MemorySpec().limit and MemorySpec().validate() == []
    assert MemorySpec("2GiB").limit.bytes == 2 << 30 and MemorySpec("2GiB").validate() == []


@pytest.mark.parametrize("budget", ["2", "-1GiB", "0GB", "2 parsecs", "much"])
def test_what_is_no_budget_is_a_problem_in_words(budget: str) -> None:
    (problem,) = MemorySpec(budget).validate()
    assert budget in problem and "such as 2GiB" in problem


def test_blocks_come_from_disk_unless_the_host_is_to_keep_them() -> None:
    assert MemorySpec().keep == "disk" and MemorySpec("2GiB", keep="host").validate() == []
