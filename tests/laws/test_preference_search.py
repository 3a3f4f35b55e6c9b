"""A search over preferences: adapters trained together on pairs become what each becomes alone; rates, ranks and β are chosen."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from kinds.preference.test_task import pairs
from laws.test_preference_runs import preferences, rated
from lorakeet.config import read_run
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.evaluate.report.report import read_report
from lorakeet.kinds.preference.spec import OBJECTIVES, PreferenceSpec, needs_reference
from lorakeet.kinds.preference.task import Preferences, PreferenceTask, Reference
from lorakeet.memory.spill import Spill
from lorakeet.models import inject
from lorakeet.models.fuse import fuse
from lorakeet.models.inject import activate
from lorakeet.models.targets import plan_for
from lorakeet.models.text.model import TextModel
from lorakeet.train.loop import train
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text import multi_adapter
from lorakeet.train.text.multi_adapter import Member, train_many
from lorakeet.verbs.options import TuneOptions
from lorakeet.verbs.tune import tune
from tiny.models import save_tiny_llama
from tiny.runs import quiet, settings, write_rows
from tiny.shared_passes import members_of_passes
from tiny.streams import loaded

NEAR = 1e-3  # relative, of a matrix: AdamW's first steps enlarge what fp32 rounds
ALL = list(OBJECTIVES)
MEMBERS: dict[str, tuple[LoraSpec, dict[str, Any], float | None]] = {
    "a": (LoraSpec(rank=4, alpha=12.0), {}, None),
    "b": (LoraSpec(rank=2, alpha=6.0, target_modules=("q_proj", "v_proj")), {"steps": 2, "seed": 3}, 0.5),
    "c": (LoraSpec(rank=6, alpha=18.0), {"learning_rate": 2e-2, "batch_size": 3}, None),
}


def spec_of(objective: str, name: str, micro_tokens: int) -> TrainSpec:
    base = TrainSpec(
        objective=objective, steps=3, batch_size=4, micro_tokens=micro_tokens, learning_rate=1e-2, evaluate_every=1, patience=0
    )  # type: ignore[arg-type]
    return dataclasses.replace(base, **MEMBERS[name][1])


def member_of(text: TextModel, objective: str, name: str, adapter: str, micro_tokens: int, prompt: int) -> Member:
    """The member `name` of MEMBERS on the model as `adapter`, with the base as its reference."""
    lora, _, beta = MEMBERS[name]
    spec = spec_of(objective, name, micro_tokens)
    inject.inject(text.model, plan_for(text.model, lora, text.family), adapter, seed=spec.seed)
    rows, held_out = pairs(9, 1, prompt=prompt), pairs(4, 2, prompt=prompt)
    flags = [number % 3 != 0 for number in range(9)]
    about = Preferences(PreferenceSpec(beta=beta).resolved(objective), None, (flags, flags[:4]))
    member = Member(adapter, spec, rows, held_out, about.task)
    if not needs_reference(objective):
        return member
    task = member.task(text)
    activate(text.model, None)
    train_rows, others = (task.losses_of(part)[0] for part in (task.train, task.held_out_rows))
    reference = Reference(-train_rows, -others, micro_tokens)
    return dataclasses.replace(member, make=dataclasses.replace(about, reference=reference).task)


def alone(
    text: TextModel, objective: str, name: str, out: Path, micro_tokens: int, prompt: int
) -> tuple[dict[str, Tensor], float]:
    """What the member becomes in a run of its own, and its best held-out loss."""
    member = member_of(text, objective, name, "default", micro_tokens, prompt)
    fuse(text.model)
    activate(text.model, "default")
    task = member.task(text)
    assert isinstance(task, PreferenceTask)
    outcome = train(task, member.spec, run=RunFolder.create(out))
    assert outcome.best_loss is not None
    return {key: value.detach() for key, value in task.parameters().items()}, outcome.best_loss


def require_equal(folder: Path, tmp_path: Path, objective: str, *, micro_tokens: int = 400, prompt: int = 6) -> None:
    """Trains all members together, in memory, and each alone; requires equal values and held-out losses."""
    text = loaded(folder)
    members = [member_of(text, objective, name, name, micro_tokens, prompt) for name in MEMBERS]
    fuse(text.model)
    ended = train_many(text, members)
    assert [at.step for at in ended] == [3, 2, 3] and not any(at.diverged for at in ended)
    for name, at in zip(MEMBERS, ended, strict=True):
        single, loss = alone(loaded(folder), objective, name, tmp_path / name, micro_tokens, prompt)
        assert at.best is not None and at.best.value == pytest.approx(loss, rel=1e-5)
        found = inject.trained_parameters(text.model, name)
        assert single.keys() == found.keys()
        for key, value in single.items():
            assert float((found[key].detach() - value).norm() / value.norm()) < NEAR, f"{name} {key}"


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return members_of_passes(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ALL)
def test_adapters_in_one_pass_become_what_each_becomes_alone(
    objective: str, tiny_llama_folder: Path, tmp_path: Path, shared: list[int]
) -> None:
    """Of other ranks, targets, rates, seeds, batch sizes and β; small steps share one pass over the base."""
    require_equal(tiny_llama_folder, tmp_path, objective)
    assert shared == [3, 3, 2]


@pytest.mark.slow
def test_long_prompts_are_computed_by_each_as_alone(tiny_llama_folder: Path, tmp_path: Path, shared: list[int]) -> None:
    """Steps that fill a pass of their own, with the prompt of each pair computed once."""
    require_equal(tiny_llama_folder, tmp_path, "dpo", micro_tokens=4096, prompt=150)
    assert set(shared) == {1}


@pytest.mark.slow
def test_streamed_members_share_each_block(tmp_path: Path) -> None:
    """Each block is read as often for three members as for one, and they become the same."""
    folder, reads, values = save_tiny_llama(tmp_path / "model", num_hidden_layers=6), [], []
    for names in ("a", "abc"):
        text = loaded(folder, tmp_path / f"store {names}")
        members = [member_of(text, "dpo", name, name, 400, 6) for name in names]
        fuse(text.model)
        assert text.streamed is not None
        before = text.streamed.stream.bytes_read
        many = multi_adapter.MultiAdapterTraining(text, [dataclasses.replace(one, held_out=()) for one in members],
                                                  spill=Spill(tmp_path))  # fmt: skip
        many.round()
        reads.append(text.streamed.stream.bytes_read - before)
        values.append({key: value.detach().clone() for key, value in inject.trained_parameters(text.model, "a").items()})
    assert reads[0] == reads[1] > 0
    for key, value in values[0].items():
        torch.testing.assert_close(values[1][key], value, rtol=1e-3, atol=2e-6)


SLOW = {"train.steps": 4, "data.held_out_fraction": 0.3, "evaluate.resamples": 200, "train.rate_trial_steps": 0}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_rates_are_compared_by_the_loss_of_a_pair(objective: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", rated(50) if objective == "kto" else preferences(50))
    changes = {**SLOW, "train.objective": objective, "train.learning_rate": 1e-3}
    config = settings(tiny_llama_folder, rows, tmp_path / "run", changes)
    said = io.StringIO()
    found = tune(config, TuneOptions(try_rates=True), console=Console(file=said, width=200))
    assert [trial.name for trial in found.search.trials] == ["run file", "rate ×0.5", "rate ×2"]
    assert found.search.measure == "loss of a pair" and {trial.steps for trial in found.search.trials} == {4}
    assert all(trial.loss is not None and trial.loss.n == found.search.rows for trial in found.search.trials)
    page = (found.out / "report.html").read_text()
    assert f"Every trial on {found.search.rows} held-out rows, loss of a pair" in page and "nats a token" not in page
    assert f"{found.search.rows} held-out pairs choose." in said.getvalue() and "nats a token" not in said.getvalue()


@pytest.mark.slow
def test_beta_and_rank_are_chosen_by_what_is_preferred(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Losses of different β are no common measure: the share of pairs decides, and no trial is stopped on the way."""
    rows = write_rows(tmp_path / "rows.jsonl", preferences(50))
    config = settings(tiny_llama_folder, rows, tmp_path / "run", {**SLOW, "train.objective": "dpo", "train.learning_rate": 3e-3})
    options = TuneOptions(
        tokens=12_000, together=3, rate_factors=(1.0, 1.0), rank_choices=(2, 4), target_choices=(), beta_choices=(0.05, 0.5),
        seeds=2,
    )  # fmt: skip
    found = tune(config, options, console=quiet())
    search = read_report(found.out / "report.json").search
    assert search is not None and search.measure == "share of pairs not preferred"
    assert {trial.ended for trial in search.trials} == {"all steps done"} and len(search.trials) >= 3
    assert all("beta" in trial.settings for trial in search.trials[1:])
    losses = [trial.loss.value for trial in search.trials if trial.loss is not None]
    assert len(losses) == len(search.trials) and all(0 <= loss <= 1 for loss in losses)
    chosen = read_run(found.out / "config.yaml")
    assert chosen.preference.beta in (None, 0.05, 0.5) and chosen.train.objective == "dpo"


@pytest.mark.slow
def test_the_default_rate_of_a_search_is_that_of_a_run(tiny_llama_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", preferences(50))
    changes = {**SLOW, "train.objective": "simpo", "train.steps": 1, "train.learning_rate": None}
    found = tune(settings(tiny_llama_folder, rows, tmp_path / "run", changes), TuneOptions(try_rates=True), console=quiet())
    sft = settings(tiny_llama_folder, rows, tmp_path / "run", {})
    rate = read_run(found.out / "config.yaml").train.learning_rate
    text = loaded(tiny_llama_folder)
    task = PreferenceTask(
        inject_one(text), pairs(4, 1), held_out=(), spec=TrainSpec(objective="simpo"),
        preference=PreferenceSpec().resolved("simpo"),
    )  # fmt: skip
    assert sft.train.objective == "sft" and rate == pytest.approx(task.learning_rate)


def inject_one(text: TextModel) -> TextModel:
    inject.inject(text.model, plan_for(text.model, LoraSpec(rank=2), text.family), seed=0)
    return text


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, {"beta_choices": (0.1, 0.2)}, "--beta-choices is given, but train.objective is sft"),
        ({"train.objective": "dpo"}, {"beta_choices": (0.1, 0.0)}, "--beta-choices has 0; expected values above 0"),
        ({"train.objective": "dpo", "train.keep_prefix_states": True}, {}, "computes its reference with every block"),
        ({"train.objective": "dpo", "train.reference": "/nowhere"}, {}, "The reference /nowhere does not exist"),
    ],
)
def test_searches_that_cannot_be_made_are_refused(
    changes: dict[str, Any], options: dict[str, Any], said: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in preferences(50)]
    rows = preferences(50) if changes else answers
    config = settings(tiny_llama_folder, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", {**SLOW, **changes})
    with pytest.raises(ConfigError) as caught:
        tune(config, TuneOptions(tokens=1000, **options), console=quiet())
    assert said in str(caught.value) and not (tmp_path / "run-tune").exists()
