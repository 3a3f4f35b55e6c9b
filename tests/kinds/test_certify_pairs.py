"""The checks of the adapter's files: a pair that one lacks fails the run, and what PEFT cannot read is an artefact's failure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import VerificationFailed
from lorakeet.evaluate.certificate import Certificate, Unchecked
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.formats.peft import peft
from lorakeet.kinds.certify_pairs import PAIRS, check_by_peft, check_saved
from lorakeet.kinds.text.certify import certify_text
from lorakeet.models.compare_saved import SavedDifference
from lorakeet.models.text import by_peft
from lorakeet.runs.open_adapter import NAME, open_adapter
from lorakeet.train.run import RunFolder
from lorakeet.train.text.task import TextTask
from lorakeet.verification.artefact import is_there
from tiny.models import save_tiny_llama
from tiny.runs import quiet, reviews, run, write_rows

PATH = "model.layers.1.mlp.up_proj"


def certified(finished: Any, adapter: Path, *, twice: bool) -> Certificate:
    live = open_adapter(finished.path).text_model(quiet(), dtype="float32")
    setup = finished.result.setup
    model = setup.config.model if twice else None
    rows, spec = setup.held_out.examples, EvaluateSpec(resamples=50)
    return certify_text(live, adapter, rows, before={}, model=model, spec=spec, name=NAME)


@pytest.mark.parametrize("twice", [True, False])
def test_a_file_that_lacks_a_pair_fails_and_names_it(finished: Any, tmp_path: Path, twice: bool) -> None:
    held = peft.read(finished.path / "adapter")
    fewer = {path: pair for path, pair in held.pairs.items() if path != PATH}
    peft.write(replace(held, pairs=fewer), tmp_path / "adapter")
    found = certified(finished, tmp_path / "adapter", twice=twice)
    check = next(check for check in found.checks if check.name == PAIRS)
    assert not check.passed and check.measured == {"missing_tensors": 2.0, "changed_tensors": 0.0}
    assert check.n == 28 and f"{PATH}.A, {PATH}.B: 2 trained, but not in the file" in check.detail


@pytest.mark.slow
def test_a_run_that_saves_one_pair_too_few_fails(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pair is near zero, so that logits alone would not show it."""
    adapter_of_task = TextTask.adapter

    def without_one(task: TextTask) -> Any:
        whole = adapter_of_task(task)
        return replace(whole, pairs={path: pair for path, pair in whole.pairs.items() if path != PATH})

    monkeypatch.setattr(TextTask, "adapter", without_one)
    with pytest.raises(VerificationFailed, match=PATH):
        run(tiny_llama_folder, write_rows(tmp_path / "rows.jsonl", reviews(40)), tmp_path / "run",
            {"train.steps": 2, "train.learning_rate": 1e-9})  # fmt: skip
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert not certificate["passed"]
    assert [check["name"] for check in certificate["checks"] if not check["passed"]] == [PAIRS]


def test_what_differs_is_counted_once_and_named() -> None:
    names = tuple(f"x.{number}" for number in range(5))
    check = check_saved(SavedDifference(9, names, (), names, ("y",), ("z",)), "adapter")
    assert check.measured == {"missing_tensors": 6.0, "changed_tensors": 1.0} and not check.passed
    assert "x.0, x.1, x.2 and 2 more: 5 trained, but not in the file" in check.detail
    assert "z: 1 with other numbers" in check.detail
    same = check_saved(SavedDifference(9, (), (), (), (), ()), "adapter")
    assert same.passed and not same.detail


@pytest.mark.slow
def test_an_expert_that_saw_no_token_is_named(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", family="mixtral", num_local_experts=24, num_experts_per_tok=1)
    rows = write_rows(tmp_path / "rows.jsonl", reviews(40))
    result = run(base, rows, tmp_path / "run", {"train.steps": 2, "evaluate.answers": 0})
    report, moved = result.report, result.setup.moved
    assert report is not None and report.certificate is not None and report.certificate.passed
    row = next(row for row in report.targets if row.kind == "experts")
    assert row.tokens is not None and row.experts == row.tokens.experts == 48 and 0 < row.tokens.unseen < 48
    block, counts = next(iter(moved.tokens.items()))
    still = [expert for expert, left in enumerate(moved.left_start(f"{block}.down_proj")) if not left]
    assert set(still) >= {expert for expert, count in enumerate(counts) if not count} and still
    named = next(line for line in report.warnings if f"{block}.down_proj" in line)
    assert f"did not move: {block}.down_proj: {len(still)} of 24 experts (" in named and "saw 0" in named
    assert json.loads((tmp_path / "run" / "report.json").read_text())["targets"][0]["kind"] == "embeddings"


def test_peft_that_cannot_load_it_is_an_artefact_that_failed(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = open_adapter(finished.path).text_model(quiet(), dtype="float32")
    broken = tmp_path / "adapter"
    broken.mkdir()
    check = check_by_peft(fresh, NAME, broken, finished.result.setup.held_out.examples)
    assert not isinstance(check, Unchecked) and not check.passed and "PEFT cannot load it" in check.detail
    assert Certificate("x", (*finished.result.report.certificate.own, check)).passed
    assert is_there(check.artefact, tmp_path / "nowhere")
    monkeypatch.setattr(by_peft, "peft_version", lambda: "")
    missing = check_by_peft(fresh, NAME, broken, ())
    assert str(missing) == "not checked: logits of adapter/ in PEFT, since PEFT is not installed"


def test_a_budget_leaves_no_memory_for_peft(finished: Any) -> None:
    found = certified(finished, RunFolder(finished.path).adapter, twice=False)
    assert [str(one) for one in found.unchecked] == ["not checked: logits of adapter/ in PEFT, since memory is for one base"]
