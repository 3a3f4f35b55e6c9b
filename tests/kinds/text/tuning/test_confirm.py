"""`kinds.text.tuning.confirm`: the winner on other rows and from other seeds, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorakeet.evaluate.compare import compare_losses
from lorakeet.kinds.text.assemble import TextAssembly
from lorakeet.kinds.text.tuning.confirm import Confirmation, confirm
from lorakeet.kinds.text.tuning.trials import SPENT, START, Trial
from lorakeet.models.inject import adapter_names
from lorakeet.runs.search_space import SearchPoint
from tiny.searches import HOT, assembled, trials_of


@pytest.fixture(scope="module")
def setup(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TextAssembly:
    return assembled(tiny_llama_folder, tmp_path_factory.mktemp("search"))


def test_where_the_run_files_settings_diverge_the_best_is_unconfirmed(setup: TextAssembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(START, SearchPoint(HOT)), Trial("mild", SearchPoint())], rungs=())
    best = trials.best()
    confirmed = confirm(trials, best, 1)
    assert best.name == "mild" and confirmed.found is None and confirmed.chosen is best
    assert "own settings diverged" in confirmed.conclusion


@pytest.mark.slow
def test_the_confirmation_is_over_new_seeds_and_over_rows_that_did_not_choose(setup: TextAssembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(START, SearchPoint()), Trial("other", SearchPoint(2.0, 2, "mlp"))], rungs=())
    winner, trained = trials.all[1], []
    usual = trials.member
    trials.member = lambda name, trial, rows, seed=0: trained.append((trial.name, seed)) or usual(name, trial, rows, seed)  # type: ignore[method-assign,func-returns-value]
    of_one = confirm(trials, winner, 1)
    one = of_one.found
    assert one is not None and one.test == "paired randomisation" and not trained
    assert "n = 9, of seed 0 alone" in of_one.conclusion
    of_two = confirm(trials, winner, 2, together=4)
    two = of_two.found
    assert trained == [("other", 1), (START, 1), ("other", 2), (START, 2)] and adapter_names(setup.text.model) == []
    assert two is not None and two.test == "t over rows and 2 seeds" and (two.left, two.right) == ("other", START)
    assert one.difference.n == two.difference.n == len(trials.rows.confirm) and one.difference.value != two.difference.value
    assert "n = 9, 2 new seeds each" in of_two.conclusion


@pytest.mark.slow
def test_a_winner_that_diverges_under_another_seed_is_not_confirmed(setup: TextAssembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(START, SearchPoint()), Trial("other", SearchPoint(2.0))], rungs=())
    trials.all[1].point = SearchPoint(HOT)
    trained, usual = [], trials.member
    trials.member = lambda name, *rest: trained.append(name) or usual(name, *rest)  # type: ignore[method-assign,func-returns-value]
    confirmed = confirm(trials, trials.all[1], 4, together=4)
    assert confirmed.found is None and adapter_names(setup.text.model) == []
    assert trained == ["0_1", "1_1", "0_2", "1_2"], "no more seeds, which could not confirm it either"
    said = confirmed.conclusion
    assert "unconfirmed: with seed 1 other diverged (step" in said and said.endswith("The run file's stay.")


def test_new_seeds_trained_to_their_end_are_shown_also_where_the_budget_ended_the_search_early(setup: TextAssembly) -> None:
    trials = trials_of(setup, seconds=0.0)
    trials.generation([Trial(START, SearchPoint()), Trial("other", SearchPoint(2.0))], rungs=())
    start, winner = trials.all
    assert winner.at is not None and winner.at.done == SPENT
    better = replace(compare_losses(winner.losses, start.losses, setup.config.evaluate), verdict="better")  # type: ignore[arg-type]
    for seeds, chosen, said in ((1, start, "The run file's settings stay. Raise the budget."), (2, winner, "to their end.")):
        confirmed = Confirmation(trials, winner, seeds, found=better)
        assert confirmed.chosen is chosen and confirmed.conclusion.endswith(said)
        assert replace(confirmed, found=replace(better, verdict="no difference shown")).chosen is start


def test_where_nothing_differs_that_is_what_is_said(setup: TextAssembly) -> None:
    """At rates of next to nothing all trials are the base."""
    trials = trials_of(setup)
    trials.generation([Trial(START, SearchPoint(1e-28)), Trial("other", SearchPoint(2e-28))], rungs=())
    trials.all[1].adapter = trials.all[0].adapter  # let go, since it is not better
    confirmed = confirm(trials, trials.all[1], 1)
    assert confirmed.found is not None and confirmed.found.verdict == "no difference shown"
    assert confirmed.found.difference.value == 0
    found = trials.result(trials.all[1], confirmed.conclusion, "so few")
    assert found.conclusion.startswith("No difference shown between other (learning rate 2.00e-30 (×2e-28)) and the run file's")
    assert found.trials[1].against_start is not None and found.trials[1].against_start.verdict == "no difference shown"
