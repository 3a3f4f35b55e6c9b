"""Trials on preferences: one reference for all adapters with the same pairs, and what they are compared by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laws.test_preference_runs import preferences
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.formats.peft import peft
from lorakeet.kinds.preference import trials as pair_trials
from lorakeet.kinds.preference.task import PreferenceTask
from lorakeet.kinds.preference.trials import PairTrials
from lorakeet.kinds.text.assemble import assemble_text
from lorakeet.kinds.text.tuning.trials import START, SearchBudget, SearchRows, Trial
from lorakeet.models.inject import adapter_of, inject
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.load import load_text_model
from lorakeet.runs.search_space import SearchPoint, space_for
from tiny.models import save_tiny_llama
from tiny.runs import quiet, settings, write_rows


def trials(folder: Path, tmp_path: Path, betas: tuple[float, ...] = (), **changes: Any) -> PairTrials:
    rows = write_rows(tmp_path / "rows.jsonl", preferences(40))
    given = {"train.objective": "dpo", "train.steps": 1, "data.held_out_fraction": 0.3, "train.learning_rate": 1e-2, **changes}
    setup = assemble_text(settings(folder, rows, tmp_path / "run", given), quiet())
    space = space_for(
        setup.config, setup.text, rate_factors=(1.0, 2.0), rank_choices=(2, 4), target_choices=(), beta_choices=betas
    )
    held_out = list(setup.held_out.examples)
    return PairTrials(setup, space, SearchRows(held_out[:10], held_out[10:], {}, "others"), SearchBudget(None, None), quiet())


@pytest.mark.slow
@pytest.mark.parametrize(("reference", "passes"), [("start", 2), ("base", 1)])
def test_the_reference_is_computed_once_for_each_choice_of_pairs(
    reference: str, passes: int, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rate; where the base with the adapter off is the reference, once for all."""
    found, seen = trials(tiny_llama_folder, tmp_path, **{"train.reference": reference}), list[int]()
    usual = pair_trials.row_losses

    def watched(text: Any, rows: Any, **given: Any) -> Any:
        seen.append(len(rows))
        return usual(text, rows, **given)

    monkeypatch.setattr(pair_trials, "row_losses", watched)
    points = {START: SearchPoint(1.0, 2), "a": SearchPoint(2.0, 2), "b": SearchPoint(1.0, 4)}
    found.generation([Trial(name, point) for name, point in points.items()], rungs=())
    everything = len(found.setup.train.examples) + len(found.setup.held_out.examples)
    assert seen.count(everything) == passes
    assert all(trial.losses is not None and len(trial.losses.losses) == 5 for trial in found.all)


def test_rows_of_one_key_have_references_of_their_own(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Such as rows that differ in their system prompts alone, which their keys leave out."""
    found = trials(tiny_llama_folder, tmp_path)
    one, other, *rest = [found.rows.search[at : at + 2] for at in range(0, len(found.rows.search), 2)]
    same = [*one, *(replace(row, key=one[0].key) for row in other), *(row for pair in rest for row in pair)]
    found.rows = replace(found.rows, search=same)
    member = found.member("it", Trial(START, SearchPoint(1.0, 2)), same)
    task = member.task(found.setup.text)
    assert isinstance(task, PreferenceTask)
    reference = task.reference
    assert reference is not None
    np.testing.assert_allclose(reference.held_out, found._log_probs(same)[0], rtol=0, atol=1e-4)


def test_a_reference_of_another_base_is_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    other, folder = save_tiny_llama(tmp_path / "other", seed=5), tmp_path / "adapter"
    text = load_text_model(ModelSpec(path=str(other), dtype="float32", device="cpu"))
    inject(text.model, plan_for(text.model, LoraSpec(rank=2), text.family), seed=0)
    folder.mkdir()
    peft.write(adapter_of(text.model, base=str(other)), folder)
    with pytest.raises(ConfigError, match="whose weights are others"):
        trials(tiny_llama_folder, tmp_path, **{"train.reference": folder})


def test_the_base_is_its_own_reference_to_the_bit(tiny_llama_folder: Path, tmp_path: Path) -> None:
    found = trials(tiny_llama_folder, tmp_path)
    assert found.power(0.1).startswith("5 held-out pairs choose.")
    assert found.base_loss == pytest.approx(np.log(2), abs=1e-12)


def test_with_several_betas_the_share_of_pairs_decides(tiny_llama_folder: Path, tmp_path: Path) -> None:
    found = trials(tiny_llama_folder, tmp_path, betas=(0.1, 0.5))
    assert found.measure == "share of pairs not preferred" and found.rungs == ()
    found.power(0.1)
    assert found.base_loss == 0.5, "the base prefers neither"
    plain = trials(tiny_llama_folder, tmp_path)
    assert plain.measure == "loss of a pair" and plain.rungs == (0.25, 0.5)
