"""From the peaks of a ledger to what a process holds."""

from __future__ import annotations

from lorakeet.memory.allocator import slack
from lorakeet.memory.forecast import Forecast, phases_of
from lorakeet.memory.usage import Usage, add_usage

GIB = 1 << 30
PEAKS = {
    "step": Usage(5 * GIB, {"base": 3 * GIB, "saved activations": 2 * GIB}, heap=2 * GIB),
    "save": Usage(4 * GIB, {"base": 3 * GIB, "scratch": GIB}, heap=GIB),
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


def test_what_a_phase_holds_beside_its_tensors_adds_to_the_process() -> None:
    (phase,) = phases_of({"judge": add_usage(PEAKS["save"], runtime=7)}, GIB)
    assert phase.kinds["runtime"] == GIB + 7
