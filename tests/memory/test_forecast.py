"""From the peaks of a ledger to the memory of a process: usage added up, few blocks extended to many, the forecast."""

from __future__ import annotations

import pytest

from lorakeet.memory.allocator import slack
from lorakeet.memory.forecast import Forecast, UnevenRuns, extrapolate_peaks, phases_of
from lorakeet.memory.usage import Usage, UsageSegment, add_usage, larger_usage

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


SAVE = Usage(4, {"base": 3, "scratch": 1}, heap=1)
STEP = Usage(5, {"base": 3, "saved activations": 2}, heap=2)


def test_moments_are_added_to_and_compared() -> None:
    more = add_usage(SAVE, base=1, runtime=7)
    assert more == Usage(12, {"base": 4, "scratch": 1, "runtime": 7}, heap=1)
    assert Usage(4, {"base": 3, "scratch": 1}, heap=1) == SAVE, "the moment itself stays"
    assert larger_usage(more, STEP) is more and larger_usage(SAVE, STEP) is STEP


SAVED, SHARE, PASSING, AT_END = 7, 100, 1000, 3  # of each block: for the backward pass, all along, for a moment; at the end


def moment(**kinds: int) -> Usage:
    return Usage(sum(kinds.values()), dict(kinds), kinds.get("scratch", 0))


def run(blocks: int, *, forward_moments: int = 2, loop: bool = False) -> list[UsageSegment]:
    """Forward and backward through the blocks, and then something that takes AT_END for each block."""
    base = 50 + SHARE * blocks
    segments = [UsageSegment("step", "phase", moments=[moment(base=base)])]
    for index in range(blocks):
        saved = SAVED * index
        inside = [moment(base=base, saved=saved, scratch=PASSING if number == 1 else 0) for number in range(forward_moments)]
        segments.append(UsageSegment("step", "forward", index, inside))
    for index in reversed(range(blocks)):
        segments.append(
            UsageSegment("step", "backward", index, [moment(base=base, saved=SAVED * (index + 1), scratch=PASSING // 2)])
        )
    copies = [moment(base=base, copies=AT_END * (count + 1)) for count in range(blocks)] if loop else []
    segments.append(UsageSegment("end", "phase", moments=[moment(base=base), *copies, moment(base=base, copies=AT_END * blocks)]))
    return segments


def peaks(segments: list[UsageSegment]) -> dict[str, int]:
    return {
        phase: max(held.bytes for segment in segments if segment.phase == phase for held in segment.moments)
        for phase in ("step", "end")
    }


@pytest.mark.parametrize("wanted", [5, 32, 500])
@pytest.mark.parametrize("loop", [False, True])
def test_the_peak_of_many_blocks_follows_from_three_and_four(wanted: int, loop: bool) -> None:
    found = extrapolate_peaks(run(3, loop=loop), run(4, loop=loop), 3, wanted=wanted)
    assert {phase: held.bytes for phase, held in found.items()} == peaks(run(wanted, loop=loop))


def test_a_peak_that_is_another_moments_with_more_blocks_is_found() -> None:
    """With few blocks most is held in the first forward pass, with many in the last."""
    found = extrapolate_peaks(run(3), run(4), 3, wanted=200)["step"]
    assert found.kinds == {"base": 50 + SHARE * 200, "saved": SAVED * 199, "scratch": PASSING}
    assert found.heap == PASSING


def test_a_loop_whose_peak_is_another_moment_with_more_blocks_says_nothing() -> None:
    """Three blocks stay below what came before the loop, four do not: no line is known of the moment that counts."""
    few, more = (
        [moment(scratch=100), *(moment(scratch=35 + 20 * block) for block in range(count)), moment()] for count in (4, 5)
    )
    with pytest.raises(UnevenRuns, match="has its peak at another moment with more blocks"):
        extrapolate_peaks(
            [UsageSegment("step", "phase", moments=few)], [UsageSegment("step", "phase", moments=more)], 3, wanted=32
        )


def test_runs_that_do_not_go_through_their_blocks_alike_say_nothing() -> None:
    twice = run(4)
    twice.append(UsageSegment("step", "forward", 0, [moment(base=1)]))
    with pytest.raises(UnevenRuns, match="forward of block 0 in 'step': 1 and 2 times"):
        extrapolate_peaks(run(3), twice, 3, wanted=32)
