"""`workflows.search`: generations, rungs, trials that diverge, and the budget."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.compare import compare_losses
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.models.adapt import begin_adapter
from lorakeet.models.inject import adapter_names, eject
from lorakeet.train.loop import train
from lorakeet.train.run import RunFolder
from lorakeet.train.text_task import TextTask
from lorakeet.workflows.assemble import Assembly, assemble
from lorakeet.workflows.search import HALVED, SPENT, START, Budget, SearchRows, Trial, Trials, loss_of
from lorakeet.workflows.search_space import Point, plan_of_point, space_for
from tiny.runs import quiet, reviews, settings, write_rows

HOT = 1e6  # times the learning rate: one step leaves no number


@pytest.fixture(scope="module")
def setup(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Assembly:
    folder = tmp_path_factory.mktemp("search")
    data = write_rows(folder / "rows.jsonl", reviews(60))
    changes = {"data.held_out_fraction": 0.3, "train.steps": 8, "train.learning_rate": 0.01}
    return assemble(settings(tiny_llama_folder, data, folder / "run", changes), quiet())


def trials_of(setup: Assembly, *, tokens: int | None = None, seconds: float | None = None) -> Trials:
    choices: dict[str, Any] = {"rank_choices": (2, 4), "target_choices": ("all-linear", "mlp")}
    space = space_for(setup.config, setup.text, rate_factors=(0.01, 100.0), **choices)
    examples = list(setup.held_out.examples)
    rows = SearchRows(examples[:9], examples[9:], {}, "other rows")
    return Trials(setup, space, rows, Budget(seconds, tokens), quiet())


def test_a_trial_is_what_its_single_run_would_be_and_leaves_the_model_bare(setup: Assembly, tmp_path: Path) -> None:
    trials = trials_of(setup)
    point = Point(2.0, 2, "mlp")
    trials.generation([Trial(START, Point()), Trial("other", point)], rungs=())
    assert adapter_names(setup.text.model) == [] and [trial.at.step for trial in trials.all if trial.at] == [8, 8]
    alone = trials.space.resolved(point).train
    begin_adapter(setup.text, plan_of_point(setup.text, trials.space, point), seed=alone.seed)
    task = TextTask(setup.text, setup.train.examples, held_out=trials.rows.search, spec=alone)
    train(task, replace(alone, evaluate_every=1), run=RunFolder.create(tmp_path / "run"))
    single = trials.losses("single", trials.rows.search, "default")
    eject(setup.text.model)
    assert loss_of(trials.all[1]) == pytest.approx(float(single.losses.sum() / single.tokens.sum()), rel=1e-3)
    assert loss_of(trials.all[0]) != pytest.approx(loss_of(trials.all[1]), rel=1e-3)


def test_the_worse_half_is_given_up_twice(setup: Assembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(f"×{factor}", Point(factor)) for factor in (0.01, 0.1, 1.0, 2.0)], rungs=(0.25, 0.5))
    ended = {trial.name: (trial.at.step, trial.at.done) for trial in trials.all if trial.at is not None}
    assert ended["×0.01"] == (2, HALVED) and ended["×0.1"] == (2, HALVED)
    assert ended["×1.0"][1] == HALVED and ended["×1.0"][0] == 4 and ended["×2.0"] == (8, "all steps done")
    assert trials.best().name == "×2.0"
    assert all(trial.losses is not None for trial in trials.all)
    found = trials.result(trials.all[3], None, "so few")
    assert [trial.against_start is None for trial in found.trials] == [True, True, True, False]  # given up: no fair comparison


def test_what_trials_are_compared_with_is_trained_to_its_end_however_slow_it_is(setup: Assembly) -> None:
    """Else a fast starter would be better than a run file of a quarter of its steps."""
    trials = trials_of(setup)
    trials.generation([Trial(START, Point(0.01)), *(Trial(f"×{f}", Point(f)) for f in (0.1, 1.0, 2.0))], rungs=(0.25, 0.5))
    assert [(trial.at.step, trial.at.done) for trial in trials.all if trial.at is not None] == [
        (8, "all steps done"), (2, HALVED), (8, "all steps done"), (8, "all steps done")
    ]  # fmt: skip
    assert trials.result(trials.all[0], None, "").trials[2].against_start is not None


def test_those_given_up_count_among_the_comparisons(setup: Assembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(START, Point()), *(Trial(f"×{f}", Point(f)) for f in (0.01, 0.1, 2.0))], rungs=(0.25,))
    against = [line.against_start for line in trials.result(trials.all[3], None, "").trials]
    assert [one is None for one in against] == [True, True, True, False]
    assert against[3] is not None and against[3].test.endswith("Holm over 3")


def test_trials_that_diverge_are_marked_and_the_others_go_on(setup: Assembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(START, Point()), Trial("hot", Point(HOT))], rungs=())
    start, hot = trials.all
    assert start.at is not None and start.at.done == "all steps done" and start.losses is not None
    assert hot.at is not None and hot.at.diverged and hot.losses is None and trials.best() is start
    found = trials.result(start, trials.confirm(start, 1), "so few")
    assert found.trials[1].diverged and found.trials[1].loss is None and found.trials[0].loss is not None
    assert "keep them" in found.conclusion
    trials.all = [hot]
    with pytest.raises(DataError, match=r"Every trial diverged.*--rate-factors"):
        trials.best()


def test_where_the_run_files_settings_diverge_the_best_is_unconfirmed(setup: Assembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(START, Point(HOT)), Trial("mild", Point())], rungs=())
    best = trials.best()
    assert best.name == "mild" and trials.confirm(best, 1) is None
    assert "own settings diverged" in trials.result(best, None, "").conclusion


@pytest.mark.parametrize("limit", [{"tokens": 2500}, {"seconds": 0.0}])
def test_the_budget_ends_the_search(setup: Assembly, limit: dict[str, Any]) -> None:
    trials = trials_of(setup, **limit)
    trials.generation([Trial(START, Point()), Trial("other", Point(2.0))], rungs=())
    assert {trial.at.done for trial in trials.all if trial.at is not None} == {SPENT} and trials.budget.spent()
    assert all(trial.losses is not None and not trial.whole for trial in trials.all)
    best = trials.best()
    assert best.name in (START, "other") and best.at is not None
    said = trials.result(best, None, "").conclusion
    assert said.endswith("favours high rates. The run file's settings stay. Raise the budget.")


def test_the_confirmation_is_over_new_seeds_and_over_rows_that_did_not_choose(setup: Assembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(START, Point()), Trial("other", Point(2.0, 2, "mlp"))], rungs=())
    winner, trained = trials.all[1], []
    usual = trials._member
    trials._member = lambda name, trial, rows, seed=0: trained.append((trial.name, seed)) or usual(name, trial, rows, seed)  # type: ignore[method-assign,func-returns-value]
    one = trials.confirm(winner, 1)
    assert one is not None and one.test == "paired randomisation" and not trained
    assert "n = 9, of seed 0 alone" in trials.result(winner, one, "").conclusion
    two = trials.confirm(winner, 2, together=4)
    assert trained == [("other", 1), (START, 1), ("other", 2), (START, 2)] and adapter_names(setup.text.model) == []
    assert two is not None and two.test == "t over rows and 2 seeds" and (two.left, two.right) == ("other", START)
    assert one.difference.n == two.difference.n == len(trials.rows.confirm) and one.difference.value != two.difference.value
    assert "n = 9, 2 new seeds each" in trials.result(winner, two, "").conclusion


def test_a_winner_that_diverges_under_another_seed_is_not_confirmed(setup: Assembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(START, Point()), Trial("other", Point(2.0))], rungs=())
    trials.all[1].point = Point(HOT)
    trained, usual = [], trials._member
    trials._member = lambda name, *rest: trained.append(name) or usual(name, *rest)  # type: ignore[method-assign,func-returns-value]
    assert trials.confirm(trials.all[1], 4, together=4) is None and adapter_names(setup.text.model) == []
    assert trained == ["0_1", "1_1", "0_2", "1_2"], "no more seeds, which could not confirm it either"
    said = trials.result(trials.all[1], None, "").conclusion
    assert "unconfirmed: with seed 1 other diverged (step" in said and said.endswith("The run file's stay.")


def test_the_budget_holds_what_the_confirmation_takes(setup: Assembly) -> None:
    budget = Budget(None, 1000, used=300, kept=320)  # and a quarter more
    assert not budget.spent(299) and budget.spent(300) and budget.times(200) == 3 and budget.times(800) == 0
    assert Budget(None, 1000, used=499, kept=10**9).spent(1), "half of it at most"
    late = Budget(100.0, None, began=time.monotonic() - 60, used=100, kept=60)
    assert late.spent() and not replace(late, kept=50).spent() and late.times(60) == 1  # 0.6 seconds a token
    assert Budget(100.0, None, began=time.monotonic() - 51, used=1, kept=10**9).spent()
    assert Budget(None, None, used=10**9, kept=10**9).spent() is False and Budget(None, None).times(1) is None
    trials = trials_of(setup, tokens=20_000)
    trials.generation([Trial(START, Point()), Trial("other", Point(2.0))], rungs=())
    trials.budget.used = 19_000
    found = trials.confirm(trials.all[1], 3)
    assert found is not None and found.test == "paired randomisation" and trials.seeds == 1


def test_new_seeds_trained_to_their_end_are_shown_also_where_the_budget_ended_the_search_early(setup: Assembly) -> None:
    trials = trials_of(setup, seconds=0.0)
    trials.generation([Trial(START, Point()), Trial("other", Point(2.0))], rungs=())
    start, winner = trials.all
    assert winner.at is not None and winner.at.done == SPENT
    better = replace(compare_losses(winner.losses, start.losses, setup.config.evaluate), verdict="better")  # type: ignore[arg-type]
    for seeds, chosen, said in ((1, start, "The run file's settings stay. Raise the budget."), (2, winner, "to their end.")):
        trials.seeds = seeds
        assert trials.chosen(winner, better) is chosen and trials.result(winner, better, "").conclusion.endswith(said)
        assert trials.chosen(winner, replace(better, verdict="no difference shown")) is start


def test_where_nothing_differs_that_is_what_is_said(setup: Assembly) -> None:
    """At rates of next to nothing all trials are the base."""
    trials = trials_of(setup)
    trials.generation([Trial(START, Point(1e-28)), Trial("other", Point(2e-28))], rungs=())
    trials.all[1].adapter = trials.all[0].adapter  # let go, since it is not better
    confirmed = trials.confirm(trials.all[1], 1)
    assert confirmed is not None and confirmed.verdict == "no difference shown" and confirmed.difference.value == 0
    found = trials.result(trials.all[1], confirmed, "so few")
    assert found.conclusion.startswith("No difference shown between other (learning rate 2.00e-30 (×2e-28)) and the run file's")
    assert found.trials[1].against_start is not None and found.trials[1].against_start.verdict == "no difference shown"


def test_losses_that_are_no_numbers_are_a_divergence(setup: Assembly, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = trials_of(setup)

    def broken(system: str, rows: Any, name: str | None) -> RowLosses:
        raise DataError("no numbers")

    monkeypatch.setattr(trials, "losses", broken)
    trials.generation([Trial(START, Point())], rungs=())
    assert trials.all[0].at is not None and trials.all[0].at.diverged and trials.all[0].losses is None
    assert adapter_names(setup.text.model) == []
