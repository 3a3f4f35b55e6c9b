"""A rate for a run that names none: what is tried, chosen, saved and refused, and that the run is then an ordinary one."""

from __future__ import annotations

import io
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorakeet.config import read_run
from lorakeet.errors import ConfigError, DataError
from lorakeet.evaluate.report.report import read_report
from lorakeet.evaluate.wording import bytes_text
from lorakeet.kinds.text.assemble import TextAssembly, assemble_text
from lorakeet.kinds.text.tuning import learning_rate as choosing
from lorakeet.kinds.text.tuning.learning_rate import choose_rate
from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Phase
from lorakeet.memory.measure import resident_bytes
from lorakeet.models.inject import adapter_names
from lorakeet.runs.run_folder import rates_of
from lorakeet.runs.search_space import Space
from lorakeet.train import schedule, stopping
from lorakeet.train.text.task import learning_rate_of
from lorakeet.verbs.finetune import finetune
from lorakeet.verbs.options import FinetuneOptions
from tiny.runs import adapter_bytes, quiet, reviews, settings, write_rows

LONG = {"train.steps": 48, "train.learning_rate": "none", "data.held_out_fraction": 0.4}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(100))


def assembled(model: Path, rows: Path, out: Path, **changes: Any) -> TextAssembly:
    given = {**LONG, **{key.replace("__", "."): value for key, value in changes.items()}}
    return assemble_text(settings(model, rows, out, given), quiet())


def tried(setup: TextAssembly, **options: bool) -> tuple[TextAssembly, Any, str]:
    said = io.StringIO()
    chosen, found = choose_rate(setup, Console(file=said, width=400), **options)
    return chosen, found, said.getvalue()


def test_no_rate_is_tried_on_top_of_an_earlier_adapter(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    """A trial would train the earlier terms too."""
    setup = assembled(tiny_llama_folder, rows, tmp_path / "run")
    setup = replace(setup, config=setup.config.changed(lora={"on_top_of": "runs/first"}))
    _, found, said = tried(setup)
    assert found is None and "lora.on_top_of keeps an earlier adapter" in said


@pytest.mark.slow
def test_the_rate_is_tried_saved_and_the_run_is_that_of_the_rate(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    """The run after a trial, a run that is given the rate, and one that was cut short and resumed: the same bytes."""
    done = finetune(settings(tiny_llama_folder, rows, tmp_path / "run", LONG), console=quiet())
    saved = read_run(tmp_path / "run" / "config.yaml", {"out": str(tmp_path / "given")})
    rule = learning_rate_of(done.setup.text)
    search = read_report(tmp_path / "run" / "report.json").search
    assert search is not None and [trial.name for trial in search.trials] == ["rate ×1", "rate ×0.5", "rate ×2"]
    assert [trial.steps for trial in search.trials] == [8, 8, 8] and search == rates_of(done.run)
    factor = float(search.winner.removeprefix("rate ×"))
    assert saved.train.learning_rate == rule * factor == done.outcome.learning_rate
    assert search.conclusion.startswith(f"The learning rate {rule * factor:.2e}") and "nats a token [" in search.conclusion
    assert "The search" in done.run.page.read_text()
    assert finetune(saved, console=quiet()).report.search is None
    assert adapter_bytes(tmp_path / "given") == adapter_bytes(tmp_path / "run")
    cut = tmp_path / "cut"
    shutil.copytree(done.run.path, cut)
    newest = sorted((cut / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    (cut / "report.json").unlink()
    resumed = finetune(read_run(cut / "config.yaml"), FinetuneOptions(resume=cut), console=quiet())
    assert adapter_bytes(cut) == adapter_bytes(done.run.path) and resumed.report.search == search


@pytest.mark.slow
def test_a_rate_that_is_far_too_low_is_raised(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    setup = assembled(tiny_llama_folder, rows, tmp_path / "run", train__learning_rate=0.004, train__steps=72)
    chosen, found, said = tried(setup, requested=True)
    assert chosen.config.train.learning_rate == 0.008 and found.winner == "rate ×2"
    assert "The learning rate 8.00e-03 (×2) is taken, after 12 steps on 40 held-out rows." in said
    assert "×2: −0." in said and "], better" in said and "×0.5: +0." in said and "], worse" in said
    assert "40 rows show a difference of" in said, "what so many rows can show is said before"
    assert adapter_names(chosen.text.model) == [] and chosen.plan == setup.plan


@pytest.mark.slow
def test_without_a_difference_the_rate_stays(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    setup = assembled(tiny_llama_folder, rows, tmp_path / "run", train__learning_rate=1e-30)
    chosen, found, said = tried(setup, requested=True)
    assert chosen.config.train.learning_rate == 1e-30 and found.winner == "rate ×1"
    assert "stays" in said and said.count("no difference shown") == 2


@pytest.mark.slow
def test_a_given_rate_is_not_tried(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    setup = assembled(tiny_llama_folder, rows, tmp_path / "run", train__learning_rate=0.004)
    assert tried(setup) == (setup, None, "")
    none = assembled(tiny_llama_folder, rows, tmp_path / "run", train__rate_trial_steps=0)
    assert tried(none) == (none, None, "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__steps": 47}, "a trial (train.rate_trial_steps 12) may take 1/6 of them, which is 7, and needs 8"),
        ({"train__rate_trial_steps": 7}, "train.rate_trial_steps is 7, and a trial needs 8 or more"),
        ({"model__attention": "sdpa"}, "model.attention varlen"),
        ({"lora__target_modules": "q_proj,lm_head"}, "an adapter on lm_head cannot share a batch with others"),
        ({"lora__extra_modules": "norm"}, "an adapter on model.norm cannot share a batch with others"),
    ],
)
def test_where_rates_cannot_be_tried_that_is_said(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    setup = assembled(tiny_llama_folder, rows, tmp_path / "run", **changes)
    chosen, found, said = tried(setup)
    assert (chosen, found) == (setup, None) and words in said
    assert re.match(r"The learning rate is \S+; no other is tried, since", said)


def test_memory_and_rows_decide_too(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = assembled(tiny_llama_folder, rows, tmp_path / "run")
    plan = setup.residency.plan
    assert plan is not None and plan.rate_trial is not None and plan.rate_trial.bytes < plan.peak, "a second base is certified"
    tight = replace(setup, residency=replace(setup.residency, budget=Budget(plan.rate_trial.bytes - 1, "little")))
    assert "more than memory.budget" in tried(tight)[2]
    with monkeypatch.context() as patch:
        patch.setattr(choosing, "available_memory", lambda: (plan.rate_trial.bytes - resident_bytes() - (1 << 30), "free"))
        assert "three adapters in training would take" in (said := tried(setup)[2]) and "more than is free (" in said
    unknown = replace(setup, residency=replace(setup.residency, budget=Budget(1, "1"), plan=None))
    assert "memory.budget is set, " in tried(unknown)[2]
    few = replace(setup, held_out=replace(setup.held_out, examples=setup.held_out.examples[:1]))
    assert "1 held-out rows cannot distinguish two rates" in tried(few)[2]


def test_a_trial_that_takes_more_than_the_run_is_made_where_memory_is_free(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path
) -> None:
    setup = assembled(tiny_llama_folder, rows, tmp_path / "run")
    plan = setup.residency.plan
    assert plan is not None and plan.rate_trial is not None and plan.trying_rates() is plan
    kinds = {**plan.rate_trial.kinds, "scratch": plan.peak}
    larger = replace(plan, rate_trial=Phase(plan.rate_trial.name, kinds))
    chosen, found, said = tried(replace(setup, residency=replace(setup.residency, plan=larger)))
    peak = sum(kinds.values())
    assert found is not None and f"Memory: at most {bytes_text(peak)} planned while learning rates are tried." in said
    assert chosen.residency.plan.peak == chosen.residency.plan.training_peak == peak > plan.peak


@pytest.mark.slow
def test_rates_that_diverge_are_marked_and_all_three_are_an_error(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = assembled(tiny_llama_folder, rows, tmp_path / "run")
    monkeypatch.setattr(choosing, "space_for", lambda config, *_, **__: Space(config, 1e4, 1.0, 1.0, (), ()))
    monkeypatch.setattr(choosing, "QUICK_FACTORS", (1e-6, 1.0, 2e-6))
    chosen, found, said = tried(hot)
    assert found.trials[0].diverged and found.winner != "rate ×1" and "Against ×1: ×1 diverged" in said
    assert chosen.config.train.learning_rate in (0.01, 0.02)
    monkeypatch.setattr(choosing, "QUICK_FACTORS", (0.5, 1.0, 2.0))
    with pytest.raises(DataError, match=r"All three learning rates diverged within 8 steps.*lower train\.learning_rate"):
        choose_rate(hot, quiet())


@pytest.mark.slow
def test_a_long_run_tries_whole_rates_and_not_the_beginning_of_its_own_rise(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1,000 steps the first 12 of 30 that rise are at 0.4 of the rate at most: ×2 would be taken without ever being tried."""
    setup = assembled(tiny_llama_folder, rows, tmp_path / "run", train__steps=1000)
    tried_at: list[float] = []
    usual = schedule.factor
    monkeypatch.setattr(schedule, "factor", lambda *given, **named: tried_at.append(usual(*given, **named)) or tried_at[-1])
    _, found, said = tried(setup)
    assert [trial.steps for trial in found.trials] == [12] * 3 and "after 12 steps on" in said
    assert tried_at[::3] == pytest.approx([1 / 3, 2 / 3] + [1.0] * 10)


def test_where_all_three_diverge_before_the_run_itself_would_have_risen_its_rate_stays(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = assembled(tiny_llama_folder, rows, tmp_path / "run", train__warmup_fraction=0.5)
    monkeypatch.setattr(choosing, "space_for", lambda config, *_, **__: Space(config, 1e4, 1.0, 1.0, (), ()))
    chosen, found, said = tried(setup)
    assert chosen.config.train.learning_rate == 1e4 and all(trial.diverged for trial in found.trials)
    assert "×1 diverged after a warm-up of 2 of 8 steps. It stays, since the run warms up for 24 steps." in said


def test_a_rate_that_makes_rows_far_less_likely_has_diverged(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its losses are numbers."""
    setup = assembled(tiny_llama_folder, rows, tmp_path / "run")
    monkeypatch.setattr(stopping, "DIVERGED", -100.0)
    with pytest.raises(DataError, match="All three learning rates diverged"):
        tried(setup)


@pytest.mark.slow
def test_rows_of_one_group_tell_no_rates_apart(tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{**record, "who": "one"} for record in reviews(100)])
    held_out = write_rows(tmp_path / "held_out.jsonl", [{**record, "who": "another"} for record in reviews(20, seed=9)])
    setup = assembled(tiny_llama_folder, data, tmp_path / "run", data__group_column="who", data__held_out=held_out)
    assert {row.group for row in setup.dataset.held_out} == {"another"}
    chosen, found, said = tried(setup)
    assert (chosen, found) == (setup, None) and "1 groups of held-out rows cannot distinguish two rates" in said


def test_a_trial_of_rates_that_can_mean_nothing_is_refused(finished: Any, tmp_path: Path) -> None:
    config = read_run(finished.path / "config.yaml", {"train.rate_trial_steps": "0", "out": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"(?s)has its learning rate already.*rate_trial_steps is 0"):
        finetune(config, FinetuneOptions(resume=finished.path, try_rates=True), console=quiet())
    with pytest.raises(ConfigError, match="no rates are tried for that"):
        finetune(replace(config, kind="image"), FinetuneOptions(try_rates=True), console=quiet())
    assert not (tmp_path / "run").exists()
