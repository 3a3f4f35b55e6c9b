"""`ranks`: the settings, the greedy spending of a budget, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError, DataError
from lorakeet.ranks.allocate import allocate, pair_parameters, rank_cost, rank_pattern
from lorakeet.ranks.spec import RanksSpec, parameter_count

WIDE = PlanEntry("layers.0.wide", "linear", (12, 8), 4, 12.0)
THIN = PlanEntry("layers.0.thin", "linear", (4, 6), 4, 12.0)
STACK = PlanEntry("layers.0.experts", "experts", (3, 5, 4), 4, 12.0)
PLAN = Plan((WIDE, THIN, STACK), (), 1000)


def gains(seed: int) -> dict[str, list[float]]:
    chance = np.random.default_rng(seed)
    return {entry.path: sorted(chance.exponential(size=entry.largest_rank).tolist(), reverse=True) for entry in PLAN.entries}


def total(plan: Plan, worth: dict[str, list[float]]) -> float:
    return sum(sum(worth[entry.path][: entry.rank]) for entry in plan.entries)


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_of_ranks_is_worth_more_by_more_than_one_rank(seed: int) -> None:
    """Against all choices: the greedy one may lose the last rank that did not fit, nothing else."""
    worth, budget = gains(seed), 180
    found = allocate(PLAN, worth, budget)
    assert pair_parameters(found) <= budget
    all_ranks = itertools.product(range(1, 9), range(1, 5), range(1, 5))
    choices = [[replace(e, rank=r) for e, r in zip(PLAN.entries, ranks, strict=True)] for ranks in all_ranks]
    plans = [replace(PLAN, entries=tuple(entries)) for entries in choices]
    best = max(total(plan, worth) for plan in plans if pair_parameters(plan) <= budget)
    assert best - max(values[0] for values in worth.values()) <= total(found, worth) <= best + 1e-12


def test_everything_but_the_rank_is_kept_and_what_is_left_goes_to_cheaper_matrices() -> None:
    worth = {"layers.0.wide": [9.0, 9.0, 9.0], "layers.0.thin": [1.0, 0.1, 0.01, 0.0], "layers.0.experts": [1.0] * 4}
    found = allocate(PLAN, worth, 20 + 10 + 27 + 25)  # one rank each, one more of wide (20), and 5 that buy nothing
    assert [entry.rank for entry in found.entries] == [2, 1, 1]
    assert [replace(entry, rank=4) for entry in found.entries] == list(PLAN.entries) and found.frozen_parameters == 1000
    assert [entry.rank for entry in allocate(PLAN, worth, 57 + 20 + 10).entries] == [2, 2, 1]  # the next wide one is too dear
    assert [rank_cost(entry) for entry in PLAN.entries] == [20, 10, 27]


def test_the_highest_rank_the_gains_and_a_step_of_two_are_kept_to() -> None:
    worth = {path: [1.0] * 8 for path in ("layers.0.wide", "layers.0.thin", "layers.0.experts")}
    found = allocate(PLAN, worth, 57 * 2 + 40, largest=4, step=2)
    assert [entry.rank for entry in found.entries] == [2, 4, 2] or all(entry.rank in (2, 4) for entry in found.entries)
    assert rank_pattern(found, LoraSpec(rank=4)) == {entry.path: 2 for entry in found.entries if entry.rank == 2}


@pytest.mark.parametrize(
    ("budget", "largest", "words"),
    [
        (56, None, ["56 parameters", "below rank 1 for each of the 3 targets", "need 57", "Raise the budget"]),
        (5000, None, ["5,000 parameters", "above the full rank of all 3 targets", "Lower the budget"]),
        (200, 2, ["200 parameters", "highest measured rank", "114", "ranks.max_rank"]),
    ],
)
def test_budgets_that_do_not_fit(budget: int, largest: int | None, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        allocate(PLAN, gains(0), budget, largest=largest)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gains_that_are_no_numbers_are_named(bad: float) -> None:
    worth = {**gains(0), "layers.0.thin": [bad, 1.0]}
    with pytest.raises(DataError, match=r"'layers\.0\.thin' are not finite \(of 3 matrices\).*float32"):
        allocate(PLAN, worth, 100)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.5M", 1_500_000), ("500k", 500_000), ("2e6", 2_000_000), ("1_000", 1000), ("3,000", 3000), ("0.5 m", 500_000)],
)
def test_numbers_as_people_write_them(text: str, count: int) -> None:
    assert parameter_count(text, "--to") == count


@pytest.mark.parametrize("text", ["", "much", "-5M", "0", "1.5X", "M", "nan"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"ranks\.budget is .*expected a number of parameters such as 500k"):
        parameter_count(text, "ranks.budget")


def test_every_problem_is_found() -> None:
    assert RanksSpec().validate() == [] and RanksSpec(choose="auto", budget="1.5M").validate() == []
    found = RanksSpec(budget="lots", rows=1, max_rank=0).validate()
    assert [words.split(" is ")[0] for words in found] == ["ranks.rows", "ranks.max_rank", "ranks.budget", "ranks.budget"]
    assert "Add --ranks auto" in found[-1]


def test_what_prune_cannot_do_is_found() -> None:
    assert RanksSpec(choose="prune", budget="1.5M").validate() == []
    found = RanksSpec(choose="prune", prune_from=0.5, prune_until=0.5, prune_cuts=0).validate()
    assert [words.split(" is ")[0] for words in found] == ["ranks.prune_from", "ranks.prune_cuts"]
    assert RanksSpec(prune_from=-0.1).validate() and RanksSpec(prune_until=1.1).validate()
