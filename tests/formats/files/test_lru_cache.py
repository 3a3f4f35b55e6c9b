"""What is remembered is the same object, of the last few keys, by their content; what failed is not remembered."""

from __future__ import annotations

import pytest

from lorakeet.formats.files.lru_cache import LruCache


def test_a_result_is_worked_out_once_for_keys_of_one_content() -> None:
    known: LruCache[tuple[bytes, int], list[int]] = LruCache(2)
    worked_out: list[int] = []

    def work_out() -> list[int]:
        worked_out.append(1)
        return worked_out

    first = known.get_or_make((b"ab" * 500, 3), work_out)
    assert known.get_or_make((bytes(bytearray(b"ab" * 500)), 3), work_out) is first and len(worked_out) == 1
    known.get_or_make((b"ab" * 499 + b"ac", 3), work_out)
    known.get_or_make((b"ab" * 500, 4), work_out)
    assert len(worked_out) == 3, "another byte or length is another key"


def test_only_the_last_few_are_kept() -> None:
    known: LruCache[int, str] = LruCache(3)
    for number in range(3):
        known.put(number, str(number))
    assert known.get(0) == "0", "and is now the one that was asked for last"
    for number in range(3, 5):
        known.put(number, str(number))
    assert len(known) == 3 and [known.get(number) for number in range(5)] == ["0", None, None, "3", "4"]
    known.clear()
    assert len(known) == 0 and known.get(0) is None


def test_what_raises_is_worked_out_again() -> None:
    known: LruCache[int, str] = LruCache(3)

    def fails() -> str:
        raise ValueError("now")

    for _ in range(2):
        with pytest.raises(ValueError, match="now"):
            known.get_or_make(1, fails)
    assert known.get_or_make(1, lambda: "then") == "then"
