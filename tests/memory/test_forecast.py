"""From the peaks of a ledger to what a process holds."""

from __future__ import annotations

from lorakeet.memory.allocator import slack
from lorakeet.memory.forecast import Forecast, larger, phases_of, with_more
from lorakeet.memory.ledger import Held

GIB = 1 << 30
PEAKS = {
    "step": Held(5 * GIB, {"base": 3 * GIB, "saved activations": 2 * GIB}, heap=2 * GIB),
    "save": Held(4 * GIB, {"base": 3 * GIB, "scratch": GIB}, heap=GIB),
}


def test_a_heap_that_was_large_stays_large() -> None:
    step, save = phases_of(PEAKS, GIB // 2)
    assert step.bytes == GIB // 2 + 5 * GIB + slack(2 * GIB)
    assert save.bytes == step.bytes, "the heap of the step is still there"
    assert Forecast((save, step)).peak.bytes == step.bytes
    assert Forecast((step, save)).phase("save") is save


def test_returned_memory_leaves_only_a_little_beside_the_tensors() -> None:
    step, save = phases_of(PEAKS, GIB // 2, returning=True)
    assert step.bytes == GIB // 2 + 5 * GIB + slack(0)
    assert save.bytes == GIB // 2 + 4 * GIB + slack(0)
    assert save.to_mapping()["kinds"] == {"runtime": GIB // 2, "base": 3 * GIB, "scratch": GIB, "allocator": slack(0)}


def test_a_heap_given_back_before_a_phase_is_not_held_in_it() -> None:
    _, save = phases_of(PEAKS, GIB // 2, trimmed_before=("save",))
    assert save.bytes == GIB // 2 + 4 * GIB + slack(GIB)


def test_a_phase_may_hold_more_runtime_and_moments_are_added_up_and_compared() -> None:
    more = with_more(PEAKS["save"], base=GIB, runtime=7)
    assert more.bytes == 5 * GIB + 7 and more.kinds == {"base": 4 * GIB, "scratch": GIB, "runtime": 7} and more.heap == GIB
    assert larger(more, PEAKS["step"]) is more and larger(PEAKS["save"], more) is more
    (phase,) = phases_of({"judge": more}, GIB)
    assert phase.kinds["runtime"] == GIB + 7
