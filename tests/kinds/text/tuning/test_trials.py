"""`kinds.text.tuning.trials`: generations, rungs, trials that diverge, and the budget."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.kinds.text.assemble import TextAssembly
from lorakeet.kinds.text.tuning.confirm import confirm
from lorakeet.kinds.text.tuning.trials import HALVED, RUNGS, SPENT, START, SearchBudget, Trial, loss_of
from lorakeet.models.inject import adapter_names, eject
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.runs.search_space import SearchPoint, plan_of_point
from lorakeet.train.loop import train
from lorakeet.train.run import RunFolder
from lorakeet.train.text.task import TextTask
from tiny.searches import HOT, assembled, trials_of


@pytest.fixture(scope="module")
def setup(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TextAssembly:
    return assembled(tiny_llama_folder, tmp_path_factory.mktemp("search"))


@pytest.mark.slow
def test_a_trial_is_what_its_single_run_would_be_and_leaves_the_model_bare(setup: TextAssembly, tmp_path: Path) -> None:
    trials = trials_of(setup)
    point = SearchPoint(2.0, 2, "mlp")
    trials.generation([Trial(START, SearchPoint()), Trial("other", point)], rungs=())
    assert adapter_names(setup.text.model) == [] and [trial.at.step for trial in trials.all if trial.at] == [8, 8]
    alone = trials.space.resolved(point).train
    initialise_adapter(setup.text, plan_of_point(setup.text, trials.space, point), seed=alone.seed)
    task = TextTask(setup.text, setup.train.examples, held_out=trials.rows.search, spec=alone)
    train(task, replace(alone, evaluate_every=1), run=RunFolder.create(tmp_path / "run"))
    single = trials.losses("single", trials.rows.search, "default")
    eject(setup.text.model)
    assert loss_of(trials.all[1]) == pytest.approx(float(single.losses.sum() / single.tokens.sum()), rel=1e-3)
    assert loss_of(trials.all[0]) != pytest.approx(loss_of(trials.all[1]), rel=1e-3)


def test_the_worse_half_is_given_up_twice(setup: TextAssembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(f"×{factor}", SearchPoint(factor)) for factor in (0.01, 0.1, 1.0, 2.0)], rungs=(0.25, 0.5))
    ended = {trial.name: (trial.at.step, trial.at.done) for trial in trials.all if trial.at is not None}
    assert ended["×0.01"] == (2, HALVED) and ended["×0.1"] == (2, HALVED)
    assert ended["×1.0"][1] == HALVED and ended["×1.0"][0] == 4 and ended["×2.0"] == (8, "all steps done")
    assert trials.best().name == "×2.0"
    assert all(trial.losses is not None for trial in trials.all)
    found = trials.result(trials.all[3], "", "so few")
    assert [trial.against_start is None for trial in found.trials] == [True, True, True, False]  # given up: no fair comparison


def test_a_rung_waits_for_a_measurement_at_it_and_one_measurement_is_no_two_rungs(setup: TextAssembly) -> None:
    """Held-out losses at steps 5 and 8 of 8, rungs at 2 and 4: both would see those of step 5."""
    trials = trials_of(setup)
    seldom = replace(setup.config.train, evaluate_every=5)
    trials.setup = replace(setup, config=replace(setup.config, train=seldom))
    trials.space = replace(trials.space, config=trials.setup.config)
    trials.generation([Trial(f"×{factor}", SearchPoint(factor)) for factor in (0.01, 0.1, 1.0, 2.0)], rungs=RUNGS)
    ended = {trial.name: (trial.at.step, trial.at.done) for trial in trials.all if trial.at is not None}
    assert ended == {
        "×0.01": (5, HALVED), "×0.1": (5, HALVED), "×1.0": (8, "all steps done"), "×2.0": (8, "all steps done")
    }  # fmt: skip


class Study:
    """A sampler that draws one rate, far too high, and what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def ask(self) -> Study:
        return self

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        return HOT

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return choices[0]

    def tell(self, asked: Any, value: Any = None, state: Any = None) -> None:
        self.told.append((value, state))


def test_a_sampler_learns_that_a_rate_diverged(setup: TextAssembly) -> None:
    """A failure it would leave out, and draw the next one beside it."""
    trials, study = trials_of(setup, tokens=2500), Study()
    trials.power(0.05)
    trials.run(study, 2)
    assert trials.base_loss is not None and trials.all[1].at is not None and trials.all[1].at.diverged
    assert study.told == [(trials.base_loss + 10.0, None)]


def test_a_trial_whose_last_step_blew_up_has_diverged(setup: TextAssembly) -> None:
    trials = trials_of(setup)
    trials.base_loss = -100.0  # 10 nats above that every loss is
    trials.generation([Trial(START, SearchPoint())], rungs=(), steps=1)
    at = trials.all[0].at
    assert at is not None and at.diverged and at.done.startswith("step 1: the held-out loss is") and trials.all[0].losses is None


@pytest.mark.slow
def test_what_trials_are_compared_with_is_trained_to_its_end_however_slow_it_is(setup: TextAssembly) -> None:
    """Else a fast starter would be better than a run file of a quarter of its steps."""
    trials = trials_of(setup)
    points = [Trial(START, SearchPoint(0.01)), *(Trial(f"×{f}", SearchPoint(f)) for f in (0.1, 1.0, 2.0))]
    trials.generation(points, rungs=(0.25, 0.5))
    assert [(trial.at.step, trial.at.done) for trial in trials.all if trial.at is not None] == [
        (8, "all steps done"), (2, HALVED), (8, "all steps done"), (8, "all steps done")
    ]  # fmt: skip
    assert trials.result(trials.all[0], "", "").trials[2].against_start is not None


@pytest.mark.slow
def test_those_given_up_count_among_the_comparisons(setup: TextAssembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(START, SearchPoint()), *(Trial(f"×{f}", SearchPoint(f)) for f in (0.01, 0.1, 2.0))], rungs=(0.25,))
    against = [line.against_start for line in trials.result(trials.all[3], "", "").trials]
    assert [one is None for one in against] == [True, True, True, False]
    assert against[3] is not None and against[3].test.endswith("Holm over 3")


def test_trials_that_diverge_are_marked_and_the_others_go_on(setup: TextAssembly) -> None:
    trials = trials_of(setup)
    trials.generation([Trial(START, SearchPoint()), Trial("hot", SearchPoint(HOT))], rungs=())
    start, hot = trials.all
    assert start.at is not None and start.at.done == "all steps done" and start.losses is not None
    assert hot.at is not None and hot.at.diverged and hot.losses is None and trials.best() is start
    found = trials.result(start, confirm(trials, start, 1).conclusion, "so few")
    assert found.trials[1].diverged and found.trials[1].loss is None and found.trials[0].loss is not None
    assert "keep them" in found.conclusion
    trials.all = [hot]
    with pytest.raises(DataError, match=r"Every trial diverged.*--rate-factors"):
        trials.best()


@pytest.mark.parametrize("limit", [{"tokens": 2500}, {"seconds": 0.0}])
def test_the_budget_ends_the_search(setup: TextAssembly, limit: dict[str, Any]) -> None:
    trials = trials_of(setup, **limit)
    trials.generation([Trial(START, SearchPoint()), Trial("other", SearchPoint(2.0))], rungs=())
    assert {trial.at.done for trial in trials.all if trial.at is not None} == {SPENT} and trials.budget.spent()
    assert all(trial.losses is not None and not trial.whole for trial in trials.all)
    best = trials.best()
    assert best.name in (START, "other") and best.at is not None
    said = confirm(trials, best, 1).conclusion
    assert said.endswith("favours high rates. The run file's settings stay. Raise the budget.")


def test_the_budget_holds_what_the_confirmation_takes(setup: TextAssembly) -> None:
    budget = SearchBudget(None, 1000, used=300, reserved=320)  # and a quarter more
    assert not budget.spent(299) and budget.spent(300) and budget.times(200) == 3 and budget.times(800) == 0
    assert SearchBudget(None, 1000, used=499, reserved=10**9).spent(1), "half of it at most"
    late = SearchBudget(100.0, None, started=time.monotonic() - 60, used=100, reserved=60)
    assert late.spent() and not replace(late, reserved=50).spent() and late.times(60) == 1  # 0.6 seconds a token
    assert SearchBudget(100.0, None, started=time.monotonic() - 51, used=1, reserved=10**9).spent()
    assert SearchBudget(None, None, used=10**9, reserved=10**9).spent() is False and SearchBudget(None, None).times(1) is None
    trials = trials_of(setup, tokens=20_000)
    trials.generation([Trial(START, SearchPoint()), Trial("other", SearchPoint(2.0))], rungs=())
    trials.budget.used = 19_000
    confirmed = confirm(trials, trials.all[1], 3)
    assert confirmed.found is not None and confirmed.found.test == "paired randomisation" and confirmed.seeds == 1


def test_losses_that_are_no_numbers_are_a_divergence(setup: TextAssembly, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = trials_of(setup)

    def broken(*_: Any) -> RowLosses:
        raise DataError("no numbers")

    monkeypatch.setattr(trials, "losses", broken)
    trials.generation([Trial(START, SearchPoint())], rungs=())
    assert trials.all[0].at is not None and trials.all[0].at.diverged and trials.all[0].losses is None
    assert adapter_names(setup.text.model) == []
