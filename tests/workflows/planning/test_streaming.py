"""Which way to stream: within the budget, the one that moves the fewest bytes; more budget never moves more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.models.spec import ModelSpec
from lorakeet.workflows.planning.fit import BudgetedWork, WayChoice, choose
from lorakeet.workflows.planning.forecast_text_run import FINAL, TextRunPlan
from lorakeet.workflows.planning.rehearse_text import STEP, RowShape
from lorakeet.workflows.planning.streaming import LEAST, STATES_ON_THE_WAY, Batches, bytes_moved, streaming_ways
from lorakeet.workflows.runs.residency import Way

BLOCKS, BLOCK, STATE = 10, 1000, 30
BATCHES = Batches(4, STATE)


def plan(way: Way) -> TextRunPlan:
    """A made-up run as it is estimated: 5,000 bytes, of which two blocks, and what micro-batches on their way hold."""
    return made_up(1000 + states(way, STATES_ON_THE_WAY) - STATES_ON_THE_WAY * STATE)


def states(way: Way, held: int) -> int:
    """Bytes of hidden states: `held` of each micro-batch, and one more for each block whose input stays in memory."""
    return way.together * STATE * (held if way.spilled else held + BLOCKS)


def made_up(activations: int) -> TextRunPlan:
    phases = (Phase(STEP, {"runtime": 2000, "base": 2000, "saved activations": activations}), Phase(FINAL, {"runtime": 4000}))
    unknown: Any = None
    return TextRunPlan(Forecast(phases), unknown, RowShape(1), unknown, 2000, blocks=BLOCKS, block_bytes=BLOCK)


class Streamed(BudgetedWork[TextRunPlan]):
    """A made-up run that has to stream."""

    what, spec = "this run", ModelSpec()

    def __init__(self, plan: Callable[[Way], TextRunPlan] = plan) -> None:
        self.plan = plan  # type: ignore[method-assign]

    def ways(self, budget: int) -> Any:
        return streaming_ways(self.plan, BATCHES, budget)


def chosen(budget: int, plan: Callable[[Way], TextRunPlan] = plan) -> WayChoice[TextRunPlan]:
    return choose(Streamed(plan), Budget(budget, str(budget)))


def moved(found: WayChoice[TextRunPlan]) -> int:
    return bytes_moved(found.way, found.plan, BATCHES)


def test_with_space_for_every_block_nothing_moves() -> None:
    found = chosen(10**6)
    assert (found.way.slots, moved(found), found.way.spilled) == (BLOCKS, 0, False)
    assert found.plan.forecast.phase(STEP).kinds["base"] == BLOCKS * BLOCK


def test_the_least_spills_inputs_and_has_two_blocks_in_memory() -> None:
    least = plan(LEAST).peak
    assert least == 5000 and not chosen(least - 1).fits and chosen(least - 1).least.peak == least
    found = chosen(least)
    assert found.fits and found.way == Way(True, slots=2, together=1, spilled=True)
    assert moved(found) == 4 * 2 * 8 * BLOCK + 4 * 2 * BLOCKS * STATE


def test_more_batches_together_are_worth_more_than_more_blocks_where_they_move_less() -> None:
    found = chosen(5000 + 3 * STATES_ON_THE_WAY * STATE)  # of all four, with their inputs spilled
    assert found.way == Way(True, slots=2, together=4, spilled=True)
    assert found.plan.forecast.phase(STEP).kinds["saved activations"] == 1000 + 3 * STATES_ON_THE_WAY * STATE


@pytest.mark.parametrize("states_on_the_way", [1, 9])
def test_what_is_taken_has_been_rehearsed_whatever_was_estimated(states_on_the_way: int) -> None:
    rehearsed: list[Way] = []

    def otherwise(way: Way) -> TextRunPlan:
        rehearsed.append(way)
        return made_up(1000 + states(way, states_on_the_way))

    for budget in range(otherwise(LEAST).peak, 16000, 211):
        found = chosen(budget, otherwise)
        assert found.fits and found.plan.peak <= budget
        step = found.plan.forecast.phase(STEP)
        assert replace(found.way, slots=2) in rehearsed
        assert step.kinds["saved activations"] == 1000 + states(found.way, states_on_the_way)
        assert step.kinds["base"] == found.way.slots * BLOCK


@pytest.mark.parametrize("step", [1, 97, 500])
def test_more_budget_never_moves_more_and_every_plan_is_kept(step: int) -> None:
    before = None
    for budget in range(5000, 16000, step):
        found = chosen(budget)
        assert found.fits and found.plan.peak <= budget and 2 <= found.way.slots <= BLOCKS
        assert before is None or moved(found) <= before
        before = moved(found)
    assert before == 0


def test_evaluation_may_be_what_decides() -> None:
    def evaluated(way: Way) -> TextRunPlan:
        unknown: Any = None
        phases = (Phase(STEP, {"base": 2000}), Phase(FINAL, {"runtime": 9000}))
        return TextRunPlan(Forecast(phases), unknown, RowShape(1), unknown, 2000, blocks=BLOCKS, block_bytes=BLOCK)

    assert evaluated(LEAST).peak == 9000
    found = chosen(10_000, evaluated)
    assert found.fits and found.way.slots == 3 and found.plan.training_peak == 3000
