"""`memory.remembered`: a value is computed once for all processes of a planner, and each time outside of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lorakeet.memory.remembered import keep, key_of, passing_nothing_on, recall, remembered, remembering, state_of


def test_a_value_is_computed_once_for_what_it_depends_on() -> None:
    values: dict[str, Any] = {}
    passed: list[str] = []
    computed: list[int] = []

    def compute() -> int:
        computed.append(1)
        return len(computed)

    def found(*parts: object) -> int:
        return remembered(lambda: parts, compute)

    with remembering(values, lambda key, value: passed.append(key)):
        assert [found("a", 1), found("a", 1), found("a", 2)] == [1, 1, 2]
    with remembering(values, lambda key, value: passed.append(key)):  # a later process
        assert found("a", 1) == 1
    assert passed == list(values) and len(passed) == 2
    assert [found("a", 1), found("a", 1)] == [3, 4], "a command computes all of its plan"


def test_what_is_raised_is_not_kept_and_nothing_is_kept_outside() -> None:
    values: dict[str, Any] = {}
    with remembering(values, lambda key, value: None), pytest.raises(ValueError, match="no"):
        remembered(lambda: ("a",), lambda: int("no"))
    keep("a", 1)
    assert values == {} and recall("a") is None and key_of(lambda: pytest.fail("a key that nobody needs")) == ""


def test_a_process_beside_another_knows_and_passes_nothing_on() -> None:
    passed: list[str] = []
    with remembering({"a": 1}, lambda key, value: passed.append(key)):
        with passing_nothing_on():
            keep("b", 2)
            assert recall("a") == 1 and recall("b") == 2
        keep("c", 3)
    with passing_nothing_on():
        keep("d", 4)
    assert passed == ["c"]


def test_a_file_that_changes_is_another(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("a")
    before, folder = state_of(file), state_of(tmp_path)
    assert state_of(file) == before
    os.utime(file, (1.0, 1.0))
    assert state_of(file) != before and state_of(tmp_path) != folder and state_of(None) == ()
    assert state_of("hub:none/such") == ("hub:none/such",)
