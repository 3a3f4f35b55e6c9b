"""`verbs.evaluate`: any adapter on any rows."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers
from rich.console import Console

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem
from lorakeet.evaluate.report.report import read_report
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.verbs.evaluate import evaluate
from lorakeet.verbs.options import EvaluateOptions
from tiny.models import save_tiny_llama
from tiny.peft_oracle import by_peft
from tiny.runs import chats, quiet, reviews, tree, write_rows


def test_a_run_is_measured_on_its_own_test_rows_as_its_report_says(finished: Any) -> None:
    before = tree(finished.path)
    report = evaluate(EvaluateOptions(str(finished.path)), console=quiet()).report
    own = finished.result.report
    assert report.systems == own.systems and report.comparisons == own.comparisons and report.drift == own.drift
    assert report.subtitle.endswith("13 rows of the test file")
    assert tree(finished.path) == before


def test_a_budget_that_cannot_be_kept_is_refused(finished: Any) -> None:
    with pytest.raises(ConfigError, match=r"is 50MiB, but measuring this adapter takes at least \d+ MiB.*--memory, or"):
        evaluate(EvaluateOptions(str(finished.path), memory="50MiB"), console=quiet())


def test_a_run_is_measured_on_a_file_and_writes_a_report_there(finished: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "fresh.jsonl", reviews(9, seed=5))
    found = evaluate(EvaluateOptions(str(finished.path), data=str(data), out=tmp_path / "out"), console=quiet())
    assert found.report.systems[0].metrics["accuracy"].n == 9
    assert [system.role for system in found.report.systems] == ["adapter", "base", "floor", "floor"]
    assert "fitted to 59 rows" in found.report.systems[2].note
    assert read_report(tmp_path / "out" / "report.json") == found.report and (tmp_path / "out" / "report.html").is_file()
    assert json.loads(json.dumps(found.to_mapping()))["subtitle"].endswith("9 rows of fresh.jsonl")


def test_rows_that_the_run_has_seen_are_named_and_left_out(finished: Any, tmp_path: Path) -> None:
    trained = Path(read_run(finished.path / "config.yaml").data.train)
    seen = trained.read_text().splitlines(keepends=True)[10:13]
    (tmp_path / "seen.jsonl").write_text("".join(seen))
    with pytest.raises(DataError, match="All 3 rows were seen in training, so they show nothing"):
        evaluate(EvaluateOptions(str(finished.path), data=str(tmp_path / "seen.jsonl")), console=quiet())
    data = write_rows(tmp_path / "mixed.jsonl", reviews(9, seed=5))
    with data.open("a") as file:
        file.write("".join(seen))
    report = evaluate(EvaluateOptions(str(finished.path), data=str(data)), console=quiet()).report
    assert report.systems[0].metrics["accuracy"].n == 9 and report.subtitle.endswith("9 rows of mixed.jsonl")
    assert report.leaks is not None and len({leak.held_out for leak in report.leaks}) == 3
    assert {leak.held_out.split(":")[0] for leak in report.leaks} == {"mixed.jsonl"}
    assert report.leak_search.startswith("Searched 59 training, 12 test rows")
    assert "3 of 12 rows are also training or held-out rows (left out)." in report.warnings


@pytest.mark.slow
def test_near_copies_are_called_so_and_few_rows_give_no_conclusion(finished: Any, tmp_path: Path) -> None:
    """A newcomer's case: of 12 rows 11 were near-copies, called training rows, and the one that was left gave a verdict."""
    own = [json.loads(line) for line in Path(finished.data).read_text().splitlines()[10:13]]
    near = [{**row, "text": f"{row['text']} zinnia"} for row in own]
    data = write_rows(tmp_path / "few.jsonl", [*reviews(4, seed=5), *near])
    shown = io.StringIO()
    report = evaluate(EvaluateOptions(str(finished.path), data=str(data)), console=Console(file=shown, width=120)).report
    assert "3 of 7 rows are near-copies of training or held-out rows (left out)." in report.warnings
    said = "Only 4 of the rows could be measured: too few for a conclusion, which takes 5 at least."
    assert report.rows_of == 4 and report.verdict is None and said in report.warnings and said in shown.getvalue()
    lines = [line for line in shown.getvalue().splitlines() if "left out" in line or "are measured" in line or line == said]
    first = ["3 of 7 rows are near-copies of training or held-out rows (left out).", "4 rows of few.jsonl are measured."]
    assert lines == [*first, said], "what is known before the model is loaded is said before it, and once"
    write_rows(data, [*reviews(5, seed=5), *near, own[0]])
    report = evaluate(EvaluateOptions(str(finished.path), data=str(data)), console=quiet()).report
    assert report.rows_of == 5 and report.verdict is not None
    assert "4 of 9 rows are also training or held-out rows, 3 of them as near-copies (left out)." in report.warnings


@pytest.mark.slow
def test_a_file_can_be_evaluated_where_the_rows_of_the_run_are_gone(finished: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    gone = tmp_path / "gone.jsonl"
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(finished.data), str(gone)))
    held_out = finished.result.setup.dataset.held_out[0]
    fresh = reviews(9, seed=5)
    data = write_rows(tmp_path / "fresh.jsonl", [*fresh, {"text": held_out.text, "label": held_out.label}])
    report = evaluate(EvaluateOptions(str(run), data=str(data)), console=quiet()).report
    whole = evaluate(
        EvaluateOptions(str(finished.path), data=str(write_rows(tmp_path / "nine.jsonl", fresh))), console=quiet()
    ).report
    assert report.systems == whole.systems[:2]  # the adapter and the base; there are no baselines
    assert f"The run's own rows cannot be read ('{gone}' does not exist" in report.warnings[0]
    assert report.warnings[1] == "1 of 10 rows are held-out rows of the run (left out)."
    odd = write_rows(tmp_path / "odd.jsonl", [*reviews(6), {"text": "odd", "label": "goood"}])
    with pytest.raises(DataError, match=r"'goood' of 1 evaluated rows .*Did you mean 'good'"):
        evaluate(EvaluateOptions(str(run), data=str(odd)), console=quiet())
    with pytest.raises(DataError, match=r"gone\.jsonl' does not exist"):
        evaluate(EvaluateOptions(str(run)), console=quiet())
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("on_leak: drop", "on_leak: refuse"))
    with pytest.raises(DataError, match=r"gone\.jsonl' does not exist"):
        evaluate(EvaluateOptions(str(run), data=str(data)), console=quiet())


@pytest.mark.parametrize(("kind", "metric"), [(reviews, "accuracy"), (chats, "loss")])
def test_a_bare_adapter_of_peft_needs_only_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[int], list[Any]], metric: str
) -> None:
    quick = partial(RunConfig, evaluate=EvaluateSpec(resamples=200, drift_texts=2, drift_tokens=4))
    monkeypatch.setattr("lorakeet.runs.open_adapter.RunConfig", quick)
    base = save_tiny_llama(tmp_path / "base")
    by_peft(tmp_path / "adapter", transformers.AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj"])
    data = write_rows(tmp_path / "rows.jsonl", kind(9))
    report = evaluate(EvaluateOptions(str(tmp_path / "adapter"), data=str(data)), console=quiet()).report
    adapter, bare = report.systems
    assert (adapter.role, bare.role) == ("adapter", "base") and {metric} <= adapter.metrics.keys()
    assert report.subtitle == f"{base}, 9 rows of rows.jsonl" and report.drift is not None and report.drift.texts == 2


def test_a_bare_adapter_takes_rows_and_template_from_a_run_file(finished: Any) -> None:
    found = evaluate(EvaluateOptions(str(finished.path / "adapter"), config=finished.path / "config.yaml"), console=quiet())
    assert found.report.systems == finished.result.report.systems


def test_a_bare_adapter_without_rows_is_refused_with_the_remedy(finished: Any) -> None:
    with pytest.raises(ConfigError, match="Name a file with --data, or a run file with --config"):
        evaluate(EvaluateOptions(str(finished.path / "adapter")), console=quiet())


def test_labels_that_the_run_does_not_know_are_named(finished: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*reviews(6), {"text": "odd", "label": "goood"}])
    with pytest.raises(DataError, match=r"'goood' of 1 evaluated rows .*unseen in training.*Did you mean 'good'"):
        evaluate(EvaluateOptions(str(finished.path), data=str(data)), console=quiet())


def test_a_report_never_lands_on_something_else(finished: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="exists already"):
            evaluate(EvaluateOptions(str(finished.path), out=out), console=quiet())
    with pytest.raises(EnvironmentProblem, match="is a file"):
        evaluate(EvaluateOptions(str(finished.path), out=tmp_path / "file" / "deep"), console=quiet())
    assert (tmp_path / "file").read_text() == "kept"


def test_an_adapter_on_another_base_is_refused_with_every_mismatch(finished: Any, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", hidden_size=16, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"does not fit this base \((\d+) problems\)") as refused:
        evaluate(EvaluateOptions(str(finished.path), base=str(other), uncertified=True), console=quiet())
    said = str(refused.value)
    assert "'model.layers.0.self_attn.q_proj': A is 4×32, but this base needs 4×16." in said
    assert all(f"'model.layers.1.{name}'" in said for name in ("self_attn.q_proj", "mlp.down_proj"))


def test_an_exact_copy_is_measured_once(finished: Any, tmp_path: Path) -> None:
    fresh = reviews(9, seed=5)
    copied = [*fresh, fresh[0], fresh[1]]
    once, twice = (
        evaluate(EvaluateOptions(str(finished.path), data=str(write_rows(tmp_path / name, rows))), console=quiet()).report
        for name, rows in (("a.jsonl", fresh), ("b.jsonl", copied))
    )
    assert twice.systems == once.systems and twice.comparisons == once.comparisons
    assert any(line.startswith("2 evaluated rows are exact copies of others, to the character") for line in twice.warnings)
