"""Memory budgets as people write them, in settings too, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import ConfigError
from lorakeet.memory.budget import (
    BETWEEN_PROCESSES,
    Budget,
    available_memory,
    enough_for,
    larger_than_machine,
    machine_bytes,
    parse_size,
)
from lorakeet.memory.spec import MemorySpec


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2 << 30), ("6 GB", 6 * 10**9), ("500MB", 500 * 10**6), (" 1.5 gib ", 3 << 29), ("1,5GB", 1_500_000_000)],
)
def test_numbers_with_units(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2000000000", "without a unit"),
        ("-2GiB", "above 0"),
        ("0GB", "above 0"),
        ("2 GO", "no unit of memory"),
        ("two GiB", "expected a number"),
        ("", "expected a number"),
    ],
)
def test_what_is_no_budget_is_refused_with_an_example(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        parse_size(text)
    assert repr(text) in str(error.value) and "2GiB" in str(error.value)


def test_more_than_the_machine_has_is_said() -> None:
    have = machine_bytes()
    assert have > 1 << 28
    assert larger_than_machine(Budget(have, "all")) == "" and larger_than_machine(Budget()) == ""
    assert "is 900TiB, but this machine has" in larger_than_machine(Budget.parse("900TiB"))


def test_more_digits_than_any_machine_has_bytes_are_refused_too() -> None:
    with pytest.raises(ConfigError, match=r"more than any machine has.*such as 2GiB"):
        parse_size("9" * 5000 + "GiB")
    with pytest.raises(ConfigError, match="memory is '99999999TiB', more than"):
        parse_size("99999999TiB")
    assert parse_size("0.1GB") == 10**8, "decimals are taken as they are written"


def test_what_a_refusal_names_is_enough_for_a_process_that_holds_a_little_more() -> None:
    for planned in (1, 547 << 20, (547 << 20) + 1):
        named = parse_size(enough_for(planned))
        assert planned + BETWEEN_PROCESSES <= named <= planned + BETWEEN_PROCESSES + (1 << 20)


def test_a_budget_is_a_value_and_none_is_no_limit() -> None:
    given = Budget.parse(" 2GiB")
    assert given and (given.bytes, given.limit, str(given)) == (2 << 30, 2 << 30, "2GiB")
    none = Budget.parse(None)
    assert not none and none.limit is None and none.bytes > 1 << 60 and none == Budget()
    with pytest.raises(ConfigError, match="expected a number"):
        Budget.parse("")


def test_no_budget_is_none_and_a_budget_is_bytes() -> None:
    assert not MemorySpec().limit and MemorySpec().validate() == []
    assert MemorySpec("2GiB").limit.bytes == 2 << 30 and MemorySpec("2GiB").validate() == []


@pytest.mark.parametrize("budget", ["2", "-1GiB", "0GB", "2 parsecs", "much"])
def test_what_is_no_budget_is_a_problem_in_words(budget: str) -> None:
    (problem,) = MemorySpec(budget).validate()
    assert budget in problem and "such as 2GiB" in problem


def test_the_host_keeps_blocks_where_enough_is_free_unless_the_disk_is_named() -> None:
    assert MemorySpec().keep == "auto" and all(not MemorySpec("2GiB", keep=keep).validate() for keep in ("host", "disk"))


@pytest.mark.parametrize(("limit", "expected"), [("max", 4096 * 1024), (str(3 * 1024**2), 2 * 1024**2)])
def test_memory_stays_within_the_limit_of_a_container(tmp_path: Path, limit: str, expected: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9999 kB\nMemAvailable:    4096 kB\n")
    assert available_memory(tmp_path) == (4096 * 1024, "free")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(limit + "\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text(str(1024**2))
    assert available_memory(tmp_path) == (expected, "free")


def test_files_that_the_system_can_drop_are_not_in_use(tmp_path: Path) -> None:
    """A model that was just downloaded fills a container's memory with pages of its files."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99999999 kB\nMemAvailable: 99999999 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (("memory.max", f"{8 << 30}"), ("memory.current", f"{7 << 30}")):
        (group / name).write_text(text)
    assert available_memory(tmp_path) == (1 << 30, "free")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {6 << 30}\nactive_file 7\n")
    assert available_memory(tmp_path) == (7 << 30, "free")


def test_without_proc_all_memory_is_reported(tmp_path: Path) -> None:
    total, words = available_memory(tmp_path)
    assert total > 0 and words == "in all"
