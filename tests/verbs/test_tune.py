"""`lorakeet tune`: the verb from run file to chosen settings, and what is refused or said before it begins."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorakeet.config import read_run
from lorakeet.data.pack import pack_examples
from lorakeet.errors import ConfigError, DataError, PackageMissing
from lorakeet.evaluate.report.report import read_report
from lorakeet.kinds.text.assemble import TextAssembly, assemble_text
from lorakeet.models import modules
from lorakeet.verbs import tune as tuning
from lorakeet.verbs.options import TuneOptions
from lorakeet.verbs.tune import Tuned, tune
from tiny.image_runs import image_config
from tiny.runs import quiet, reviews, settings, write_rows

SLOW = {"train.learning_rate": 0.003, "train.steps": 8, "data.held_out_fraction": 0.25}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(120))


@pytest.mark.slow
def test_a_search_finds_better_settings_and_confirms_them_elsewhere(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    config = settings(tiny_llama_folder, rows, tmp_path / "run", {**SLOW, "evaluate.resamples": 2000})
    said, choices = io.StringIO(), {"rank_choices": (2, 4), "target_choices": ("all-linear", "mlp")}
    found = tune(config, TuneOptions(tokens=24_000, **choices), console=Console(file=said, width=200))  # type: ignore[arg-type]
    assert found.out == tmp_path / "run-tune" and {path.name for path in found.out.iterdir()} == {
        "config.yaml", "report.json", "report.html"
    }  # fmt: skip
    search = read_report(found.out / "report.json").search
    assert search == found.search and search is not None and search.trials[0].name == "run file" and len(search.trials) >= 4
    assert sum(trial.tokens for trial in search.trials) < 24_000 // 2 + 4 * 8 * 60, "the search: half of it, and a round of all"
    assert found.confirmed is not None and found.confirmed.verdict == "better" and found.confirmed.difference.n == 15
    chosen = read_run(found.out / "config.yaml")
    assert chosen.train.learning_rate is not None and chosen.train.learning_rate > 0.003 and chosen.out == config.out
    assert "is better than the run file's settings on held-out rows that the search never saw" in search.conclusion
    text = said.getvalue()
    assert text.index("15 rows show a difference of") < text.index("run file: learning rate")  # before the search
    assert found.to_mapping()["confirmed"]["verdict"] == "better"


def test_a_budget_that_ends_all_trials_early_replaces_nothing(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    config = settings(tiny_llama_folder, rows, tmp_path / "run", {**SLOW, "evaluate.resamples": 500})
    choices = {"rate_factors": (1.0, 4.0), "rank_choices": (), "target_choices": ()}
    found = tune(config, TuneOptions(tokens=3000, **choices), console=quiet())  # type: ignore[arg-type]
    assert found.confirmed is not None and found.confirmed.verdict == "better" and "of 8 steps" in found.search.conclusion
    assert read_run(found.out / "config.yaml").train.learning_rate == 0.003
    assert found.search.winner == "run file" != found.search.best
    page = (found.out / "report.html").read_text()
    assert "run file (chosen)" in page and f"{found.search.best} (best in the search)" in page


@pytest.mark.slow
def test_a_search_over_a_packed_base_ends_with_its_minutes(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    """After its first round, since no time is left for another; three adapters over one NF4 base."""
    packed = {**SLOW, "model.quantize.method": "nf4", "evaluate.resamples": 100}
    config = settings(tiny_llama_folder, rows, tmp_path / "run", packed)
    found = tune(config, TuneOptions(minutes=0.001, together=3, rank_choices=(2, 4)), console=quiet())
    assert [trial.name for trial in found.search.trials] == ["run file", "trial 1", "trial 2"]
    assert {(trial.steps, trial.ended) for trial in found.search.trials} == {(1, "the budget is spent")}
    assert "The budget ended all trials early" in found.search.conclusion and found.search.winner == "run file"
    chosen = read_run(found.out / "config.yaml")
    assert chosen.model.quantize.method == "nf4" and chosen.train.learning_rate == 0.003


@pytest.mark.slow
def test_three_rates_in_one_pass_and_no_difference_said_so(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    """At rates of next to nothing, the three trials are the base: the run file's settings stay."""
    config = settings(tiny_llama_folder, rows, tmp_path / "run", {**SLOW, "train.learning_rate": 1e-30})
    found = tune(config, TuneOptions(try_rates=True, results=tmp_path / "quick", difference=0.01), console=quiet())
    assert [trial.name for trial in found.search.trials] == ["run file", "rate ×0.5", "rate ×2"]
    assert {trial.steps for trial in found.search.trials} == {6}  # nothing improves, so patience ends them
    verdicts = [one.against_start and one.against_start.verdict for one in found.search.trials]
    assert verdicts == [None, "no difference shown", "no difference shown"]
    assert found.search.conclusion.startswith("No trial was better") and found.confirmed is None
    assert read_run(found.out / "config.yaml").train.learning_rate == 1e-30
    assert "Too few rows to distinguish trials by 0.01: that needs about" in found.search.power
    assert found.search.power in read_report(found.out / "report.json").warnings


def test_choices_that_a_quick_search_would_not_look_at_are_refused(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    config = settings(tiny_llama_folder, rows, tmp_path / "run", SLOW)
    with pytest.raises(ConfigError, match=r"--try-rates compares half, once and twice the learning rate only\. Leave it out, or"):
        tune(config, TuneOptions(try_rates=True, rank_choices=(2, 4)), console=quiet())
    assert not (tmp_path / "run-tune").exists()


@pytest.mark.slow
def test_test_rows_confirm_where_there_are_some(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", reviews(21, seed=9))
    config = settings(tiny_llama_folder, rows, tmp_path / "run", {**SLOW, "data.test": test})
    found = tune(config, TuneOptions(try_rates=True), console=quiet())
    assert found.search.rows == 30 and "on test rows" in found.search.conclusion
    assert found.confirmed is not None and found.confirmed.difference.n == 21


def test_groups_of_rows_stay_together(tiny_llama_folder: Path, tmp_path: Path) -> None:
    records = [{**record, "who": f"person {number // 4}"} for number, record in enumerate(reviews(120))]
    data = write_rows(tmp_path / "rows.jsonl", records)
    config = settings(tiny_llama_folder, data, tmp_path / "run", {**SLOW, "data.group_column": "who", "train.steps": 2})
    found = tune(config, TuneOptions(try_rates=True), console=quiet())
    assert found.search.trials[0].loss is not None and "groups" in found.search.trials[0].loss.method


TOP = {
    **SLOW, "train.steps": 2, "train.batch_size": 3, "lora.layers": "top:1", "evaluate.resamples": 100,
    "train.keep_prefix_states": "true",
}  # fmt: skip


def searched(setup: TextAssembly, keep: bool, monkeypatch: pytest.MonkeyPatch, said: io.StringIO) -> Tuned:
    """A search over the model of `setup`, in several rounds, with or without kept states."""
    train = replace(setup.config.train, keep_prefix_states=keep)
    config = replace(setup.config, train=train, out=f"{setup.config.out}-{keep}")
    monkeypatch.setattr(tuning, "assemble_text", lambda *given, **named: replace(setup, config=config))
    choices: dict[str, Any] = {"rank_choices": (2, 4), "target_choices": ("attention", "mlp"), "rate_factors": (1.0, 8.0)}
    return tune(config, TuneOptions(tokens=4000, seeds=2, together=2, **choices), console=Console(file=said, width=300))


@pytest.mark.slow
def test_a_row_passes_the_blocks_that_no_trial_adapts_once_in_a_whole_search(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With train.keep_prefix_states: the same trials, winner and confirmation as without, to rounding."""
    setup = assemble_text(settings(tiny_llama_folder, rows, tmp_path / "run", TOP), quiet())
    said, passed = io.StringIO(), list[int]()
    block: Any = modules.find(setup.text.model, "model.layers.0")
    block.register_forward_hook(lambda block, given, named, out: passed.append(sum(named["row_lengths"])), with_kwargs=True)
    tried = setup.text.layout(pack_examples(tuning._rows(setup).search))
    found = searched(setup, True, monkeypatch, said)
    once = sum(passed)
    plain = searched(setup, False, monkeypatch, io.StringIO())
    one, other = found.search.trials, plain.search.trials
    assert len(one) >= 5, "three rounds or more"
    assert [(t.name, t.settings, t.steps, t.tokens) for t in one] == [(t.name, t.settings, t.steps, t.tokens) for t in other]
    losses = [[t.loss.value for t in trials if t.loss is not None] for trials in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[1])) == len(other)
    assert found.search.best == plain.search.best != "run file"
    assert found.confirmed is not None and plain.confirmed is not None
    assert found.confirmed.difference.value == pytest.approx(plain.confirmed.difference.value, abs=1e-5)
    kept = re.search(r"lowest 1 blocks train nothing: their output .* \(([\d,]+) bytes at most\)", said.getvalue())
    assert kept is not None and setup.text.frozen_prefix is None
    looked = sum(tried.lengths)  # the rows of the search once more, to see that a pass that begins above ends as a whole one
    assert once == int(kept[1].replace(",", "")) // (32 * 4) + looked < (sum(passed) - once) / 5
    assert {path.name for path in tmp_path.iterdir()} == {"run-True-tune", "run-False-tune"}


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({"lora.layers": "all"}, {}, "the lowest block is adapted"),
        ({}, {"target_choices": ("attention", "embed_tokens")}, "something outside the blocks is trained"),
        ({"model.attention": "sdpa"}, {}, "this run uses attention sdpa"),
    ],
)
def test_states_that_cannot_be_kept_are_refused_before_any_trial(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, changes: dict[str, Any], given: dict[str, Any], words: str
) -> None:
    said, config = io.StringIO(), settings(tiny_llama_folder, rows, tmp_path / "run", {**TOP, **changes})
    with pytest.raises(ConfigError, match=f"keep_prefix_states is on, but {words}"):
        tune(config, TuneOptions(tokens=1000, rank_choices=(2, 4), **given), console=Console(file=said))
    assert "learning rate" not in said.getvalue() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ["No budget is given", "--minutes", "--try-rates"]),
        ({"minutes": -1.0}, ["--minutes is -1"]),
        ({"tokens": 0, "seeds": 0}, ["--tokens is 0", "--seeds is 0"]),
        ({"minutes": 1.0, "together": 1}, ["--together is 1", "2 or more"]),
        ({"try_rates": True, "difference": 0.0}, ["--difference is 0"]),
        ({"minutes": 1.0, "rank_choices": (), "target_choices": (), "rate_factors": ()}, ["nothing in it to choose"]),
    ],
)
def test_searches_that_cannot_begin(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, given: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        tune(settings(tiny_llama_folder, rows, tmp_path / "run", SLOW), TuneOptions(**given), console=quiet())
    assert all(word in str(caught.value) for word in words) and not (tmp_path / "run-tune").exists()


def test_a_budget_too_small_for_all_trials_is_refused_with_what_would_help(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path
) -> None:
    config = settings(tiny_llama_folder, rows, tmp_path / "run", {**SLOW, "memory.budget": "50MiB"})
    words = r"this search takes at least \d+ MiB.* and 3 adapters of rank \d+ in training at once\. Raise .* lower --together"
    with pytest.raises(ConfigError, match=words):
        tune(config, TuneOptions(try_rates=True), console=quiet())


def test_pictures_are_not_searched_on(tiny_sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind is image, and no search is for that"):
        tune(image_config(tiny_sd_folder, tmp_path), TuneOptions(try_rates=True), console=quiet())


def test_an_adapter_that_is_continued_is_refused_before_rows_are_read(tiny_llama_folder: Path, tmp_path: Path) -> None:
    given = {**SLOW, "lora.continue_from": "runs/first"}
    config = settings(tiny_llama_folder, tmp_path / "no-rows.jsonl", tmp_path / "run", given)
    with pytest.raises(ConfigError, match=r"lora\.continue_from is runs/first, but each trial starts with pairs of its own"):
        tune(config, TuneOptions(try_rates=True), console=quiet())


def test_a_missing_optuna_is_named_and_quick_needs_none(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    config = settings(tiny_llama_folder, rows, tmp_path / "run", {**SLOW, "train.steps": 1})
    with pytest.raises(PackageMissing, match="--try-rates") as caught:
        tune(config, TuneOptions(minutes=1.0), console=quiet())
    assert caught.value.values == {"packages": ["optuna"]} and caught.value.remedies[0].command == "pip install 'lorakeet[tune]'"
    assert tune(config, TuneOptions(try_rates=True), console=quiet()).search.trials


def test_too_few_rows_and_a_place_that_is_taken_are_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", reviews(9))
    config = settings(tiny_llama_folder, few, tmp_path / "run", {**SLOW, "data.held_out_fraction": 0.2})
    with pytest.raises(DataError, match=r"held-out rows are too few: those that choose and those that confirm.*data\.test"):
        tune(config, TuneOptions(try_rates=True), console=quiet())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConfigError, match="exists already"):
        tune(
            settings(tiny_llama_folder, few, tmp_path / "run", SLOW),
            TuneOptions(try_rates=True, results=tmp_path / "taken"),
            console=quiet(),
        )
