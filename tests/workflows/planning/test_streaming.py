"""Which way to stream: within the budget, the one that moves the fewest bytes; more budget never moves more."""

from __future__ import annotations

from typing import Any

import pytest

from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.workflows.planning.forecast_text_run import JUDGE, Planned
from lorakeet.workflows.planning.rehearse_text import STEP, RowShape, Streaming
from lorakeet.workflows.planning.streaming import HELD_STATES, Batches, StreamingChoice, choose_streaming, least_streamed

BLOCKS, BLOCK, STATE = 10, 1000, 30
BATCHES = Batches(4, STATE)


def plan(streaming: Streaming) -> Planned:
    """A made-up run as it is estimated: 5,000 bytes, of which two blocks, and what micro-batches on their way hold."""
    return made_up(1000 + states(streaming, HELD_STATES) - HELD_STATES * STATE)


def states(streaming: Streaming, held: int) -> int:
    """Bytes of hidden states: `held` of each micro-batch, and one more for each block whose input stays in memory."""
    return streaming.together * STATE * (held if streaming.spill else held + BLOCKS)


def made_up(activations: int) -> Planned:
    phases = (Phase(STEP, {"runtime": 2000, "base": 2000, "saved activations": activations}), Phase(JUDGE, {"runtime": 4000}))
    unknown: Any = None
    return Planned(Forecast(phases), unknown, RowShape(1), unknown, 2000, blocks=BLOCKS, block_bytes=BLOCK)


def chosen(budget: int) -> StreamingChoice:
    found = choose_streaming(plan, BATCHES, budget)
    assert found is not None
    return found


def test_with_room_for_every_block_nothing_moves() -> None:
    found = chosen(10**6)
    assert (found.slots, found.moved, found.spill, found.all_stay) == (BLOCKS, 0, False, True)
    assert found.planned.forecast.phase(STEP).kinds["base"] == BLOCKS * BLOCK


def test_the_least_puts_inputs_aside_and_holds_two_blocks() -> None:
    least = least_streamed(plan)
    assert least == 5000 and choose_streaming(plan, BATCHES, least - 1) is None
    found = chosen(least)
    assert (found.slots, found.together, found.spill) == (2, 1, True)
    assert found.moved == 4 * 2 * 8 * BLOCK + 4 * 2 * BLOCKS * STATE


def test_more_batches_together_are_worth_more_than_more_blocks_where_they_move_less() -> None:
    found = chosen(5000 + 3 * HELD_STATES * STATE)  # of all four, with their inputs aside
    assert (found.together, found.spill, found.slots) == (4, True, 2)
    assert found.planned.forecast.phase(STEP).kinds["saved activations"] == 1000 + 3 * HELD_STATES * STATE


@pytest.mark.parametrize("held", [1, 9])
def test_what_is_taken_has_been_rehearsed_whatever_was_estimated(held: int) -> None:
    rehearsed: list[Streaming] = []

    def otherwise(streaming: Streaming) -> Planned:
        rehearsed.append(streaming)
        return made_up(1000 + states(streaming, held))

    for budget in range(least_streamed(otherwise), 16000, 211):
        found = choose_streaming(otherwise, BATCHES, budget)
        assert found is not None and found.planned.peak <= budget
        way = Streaming(found.together, found.spill)
        step = found.planned.forecast.phase(STEP)
        assert way in rehearsed and step.kinds["saved activations"] == 1000 + states(way, held)
        assert step.kinds["base"] == found.slots * BLOCK


@pytest.mark.parametrize("step", [1, 97, 500])
def test_more_budget_never_moves_more_and_every_plan_is_kept(step: int) -> None:
    moved = None
    for budget in range(5000, 16000, step):
        found = chosen(budget)
        assert found.planned.peak <= budget and 2 <= found.slots <= BLOCKS
        assert moved is None or found.moved <= moved
        moved = found.moved
    assert moved == 0


def test_the_judge_may_be_what_decides() -> None:
    def judged(streaming: Streaming) -> Planned:
        unknown: Any = None
        phases = (Phase(STEP, {"base": 2000}), Phase(JUDGE, {"runtime": 9000}))
        return Planned(Forecast(phases), unknown, RowShape(1), unknown, 2000, blocks=BLOCKS, block_bytes=BLOCK)

    assert least_streamed(judged) == 9000
    found = choose_streaming(judged, BATCHES, 10_000)
    assert found is not None and found.slots == 3 and found.planned.training_peak == 3000
