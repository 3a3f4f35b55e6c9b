from __future__ import annotations

import math

import pytest

from lorakeet.evaluate.wording import as_written, bytes_text, compact, duration_text, number, signed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8049, "0.805"),
        (-0.5, "−0.500"),
        (0.0, "0.000"),
        (1.4e-11, "1.4e−11"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
        (None, "–"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_signs() -> None:
    assert (signed(0.17), signed(-0.17), signed(0.0)) == ("+0.170", "−0.170", "0.000")


def test_compact_numbers() -> None:
    assert (compact(2.04e-5), compact(1.0), compact(-3.0), compact(1e20)) == ("2.04e−5", "1", "−3", "1e20")


def test_sizes() -> None:
    sizes = (None, 12, 3000, 94 << 20, 1_720_000_000)
    assert [bytes_text(size) for size in sizes] == ["–", "12 bytes", "3 KiB", "94 MiB", "1.60 GiB"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.034, "0.034 s"), (1, "1 s"), (89, "89 s"), (90, "2 min"), (1700, "28 min"), (5400, "1 h 30 min"), (7200, "2 h"),
        (2 * 86400 + 4 * 3600, "2 days 4 h"), (3 * 86400, "3 days"),
    ],
)  # fmt: skip
def test_times_as_people_write_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_the_parts_of_a_time_add_up_to_the_whole_that_is_written() -> None:
    parts = (95.0, 155.0, 12.0)
    assert [duration_text(part) for part in parts] == ["2 min", "3 min", "12 s"]
    assert duration_text(sum(map(as_written, parts))) == "5 min" != duration_text(sum(parts))
