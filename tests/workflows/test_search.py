"""`workflows.search`: generations, rungs, trials that diverge, and the budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import DataError
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
    assert trials.best().name in (START, "other")


def test_the_confirmation_is_over_seeds_and_over_rows_that_did_not_choose(setup: Assembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(START, Point()), Trial("other", Point(2.0, 2, "mlp"))], rungs=())
    one, three = trials.confirm(trials.all[1], 1), trials.confirm(trials.all[1], 3)
    assert one is not None and three is not None and adapter_names(setup.text.model) == []
    assert one.difference.n == three.difference.n == len(trials.rows.confirm)
    assert one.difference.value != three.difference.value and (one.left, one.right) == ("other", START)


def test_where_nothing_differs_that_is_what_is_said(setup: Assembly) -> None:
    """At rates of next to nothing all trials are the base."""
    trials = trials_of(setup)
    trials.generation([Trial(START, Point(1e-28)), Trial("other", Point(2e-28))], rungs=())
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
