"""Moments added to and compared."""

from __future__ import annotations

from lorakeet.memory.usage import Held, larger, with_more

SAVE = Held(4, {"base": 3, "scratch": 1}, heap=1)
STEP = Held(5, {"base": 3, "saved activations": 2}, heap=2)


def test_moments_are_added_to_and_compared() -> None:
    more = with_more(SAVE, base=1, runtime=7)
    assert more == Held(12, {"base": 4, "scratch": 1, "runtime": 7}, heap=1)
    assert Held(4, {"base": 3, "scratch": 1}, heap=1) == SAVE, "the moment itself stays"
    assert larger(more, STEP) is more and larger(SAVE, STEP) is STEP
