"""Moments added to and compared."""

from __future__ import annotations

from lorakeet.memory.usage import Usage, add_usage, larger_usage

SAVE = Usage(4, {"base": 3, "scratch": 1}, heap=1)
STEP = Usage(5, {"base": 3, "saved activations": 2}, heap=2)


def test_moments_are_added_to_and_compared() -> None:
    more = add_usage(SAVE, base=1, runtime=7)
    assert more == Usage(12, {"base": 4, "scratch": 1, "runtime": 7}, heap=1)
    assert Usage(4, {"base": 3, "scratch": 1}, heap=1) == SAVE, "the moment itself stays"
    assert larger_usage(more, STEP) is more and larger_usage(SAVE, STEP) is STEP
