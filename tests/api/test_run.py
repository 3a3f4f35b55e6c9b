"""`finetune` from Python: what a run is given, what it calls, what it holds, and how it shows itself."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorakeet as lk
from api.conftest import SETTINGS, Shared
from lorakeet.cli.main import main
from lorakeet.errors import ConfigError, DataError
from tiny.runs import adapter_bytes, reviews


def test_callbacks_get_the_lines_of_the_log(shared: Shared) -> None:
    logged = shared.run.metrics
    assert shared.steps == [line for line in logged if "loss" in line] and len(shared.steps) == 6
    assert shared.evaluations == [line for line in logged if "held_out_loss" in line] and shared.evaluations[0]["step"] == 0


def test_metrics_are_attributes_with_their_interval(shared: Shared) -> None:
    report = shared.run.report
    accuracy = report.adapter.accuracy
    assert str(accuracy) == f"{accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}] n=18"
    assert report.base.accuracy.n == 18 and "accuracy" in dir(report.base) and str(accuracy) in str(report)
    assert report["majority class"].accuracy.value <= 1
    with pytest.raises(AttributeError, match=r"'acuracy' was not measured; there are accuracy"):
        _ = report.adapter.acuracy
    with pytest.raises(KeyError, match=r"no system 'majority'; it has"):
        report["majority"]


def test_pages_in_a_notebook(shared: Shared) -> None:
    page = shared.run.report._repr_html_()
    assert page.startswith("<iframe srcdoc=") and page.count('"') == 8 and "&lt;html" in page
    assert "<table>" in shared.run._repr_html_() and "<th>Accuracy</th>" in shared.run._repr_html_()
    assert "certificate passed" in str(shared.run)
    assert shared.run.certificate.passed


@pytest.mark.slow
def test_the_command_line_does_the_same_again(shared: Shared, tmp_path: Path) -> None:
    """The run file of a run from Python gives the same adapter by the command; and a run file does in Python."""
    command = ["finetune", str(shared.run.folder.config), "--out", str(tmp_path / "again")]
    assert main(command) == 0
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(shared.run.path)
    config = lk.read_run(shared.run.folder.config, {"out": str(tmp_path / "third")})
    run = lk.finetune(config, quiet=True)
    assert adapter_bytes(run.path) == adapter_bytes(shared.run.path)


def test_an_opened_run_is_the_same(shared: Shared) -> None:
    opened = lk.open_run(shared.run.path)
    assert opened == shared.run and str(opened.report) == str(shared.run.report) and opened.labels == ("bad", "good", "so so")
    assert [row.key for row in opened.rows.held_out] == [row.key for row in shared.rows.held_out]
    with pytest.raises(DataError, match=r"is no run: it has no config.yaml"):
        lk.open_run(shared.run.path.parent)


def test_the_readers_take_texts(shared: Shared) -> None:
    folder = shared.run.folder
    assert lk.read_report(str(folder.report)) == shared.run.report.value and lk.read_run(str(folder.config)) == shared.run.config
    assert lk.read_certificate(str(folder.certificate)).passed
    assert lk.read_adapter(str(shared.run.path)).pairs.keys() == set(shared.run.adapter)


def test_losses_are_those_of_the_report(shared: Shared) -> None:
    """The mean over target tokens of `losses` is the report's held-out loss, for base and adapter."""
    logged = [line["held_out_loss"] for line in shared.run.metrics if "held_out_loss" in line]
    base = shared.model.losses(shared.rows)
    with shared.model.using(shared.run):
        trained = shared.model.losses(shared.rows.held_out)
    assert base.shape == (18,) and trained.mean() < base.mean()
    assert np.average(base) == pytest.approx(logged[0], rel=0.05)  # rows have nearly the same number of targets
    assert np.array_equal(shared.model.losses(shared.rows), base), "the adapter is off again"


def test_labels_are_the_reports(shared: Shared) -> None:
    """`classify` has the accuracy of the report on the same rows, and probabilities that sum to one."""
    texts = [row.turns[0].text for row in shared.rows.held_out]
    answers = shared.run.classify(texts)
    right = [answer.label == row.label for answer, row in zip(answers, shared.rows.held_out, strict=True)]
    assert np.mean(right) == pytest.approx(shared.run.report.adapter.accuracy.value)
    first = answers[0].probabilities
    assert sum(first.values()) == pytest.approx(1) and answers[0].probability == max(first.values()) == first[answers[0].label]
    with pytest.raises(DataError, match=r"text 2: column 'text' is empty"):
        shared.run.classify(["fine", " "])


def test_mistakes_are_one_message_and_write_nothing(
    shared: Shared, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    out, rows = tmp_path / "out", lk.rows(reviews(20), held_out=0.3)
    calls = [
        (lambda: lk.finetune(tiny_llama_folder, out=out), "rows is missing; give lk.rows"),
        (lambda: lk.finetune(tiny_llama_folder, rows, out=out, rank=3), "finetune has no argument 'rank'; it takes lora, train"),
        (lambda: lk.finetune(tiny_llama_folder, rows, out=shared.run.path), "exists already; nothing in it was touched"),
        (lambda: lk.finetune(shared.run.config, rows), "A RunConfig has every setting, rows included"),
        (lambda: lk.finetune(shared.run.config, out=out), "A RunConfig has every setting, rows included"),
        (lambda: lk.finetune(tmp_path / "none", rows, out=out), "none"),
    ]
    for call, message in calls:
        with pytest.raises((ConfigError, DataError), match=message):
            call()
    with pytest.raises(ConfigError, match=r"lora.rank is 0"):
        lk.finetune(tiny_llama_folder, rows, lora=lk.Lora(rank=0), out=out)
    assert not list(tmp_path.iterdir()), "nothing was written, in the cache neither"
    with pytest.raises(ConfigError, match=r"texts is 'fine' \(str\); expected a list"):
        shared.run.classify("fine")
    for wrong in ({"text": "a review"}, {"text": 5}):
        with pytest.raises(ConfigError, match=r"^texts is \{'text': .*\} \(dict\); expected a list"):
            shared.run.classify(wrong)  # type: ignore[arg-type]
    for texts in (iter(["fine", 5]), np.array(["fine", 5], dtype=object), ["fine", 5]):
        with pytest.raises(ConfigError, match=r"^texts\[1\] is 5 \(int\); expected text or a dict\.$"):
            shared.run.classify(texts)
    with pytest.raises(ConfigError, match=r"^prompt is \{'role': 'user'.* \(dict\); expected text or a list"):
        shared.run.generate({"role": "user", "content": "hello"})


@pytest.mark.slow
def test_ctrl_c_stops_a_run_as_in_a_terminal(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt of a notebook is the same signal, sent while its cell runs in the main thread."""
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    before = signal.getsignal(signal.SIGINT)

    def interrupt(record: Any) -> None:
        if record["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(lk.LorakeetError, match=r"Ctrl-C: stopped after step [23] of 6, with the checkpoint") as caught:
        rows = lk.rows(reviews(40), held_out=0.3)
        lk.finetune(tiny_llama_folder, rows, out=tmp_path / "out", quiet=True, on_step=interrupt, **SETTINGS)
    assert caught.value.exit_code == 4 and signal.getsignal(signal.SIGINT) is before
    assert any((tmp_path / "out" / "checkpoints").iterdir()) and not (tmp_path / "out" / "report.json").exists()


def test_a_callback_that_fails_ends_the_run_with_its_error(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))

    def stop(record: Any) -> None:
        raise ValueError(f"at step {record['step']}")

    with pytest.raises(ValueError, match=r"at step 1"):
        rows = lk.rows(reviews(40), held_out=0.3)
        lk.finetune(tiny_llama_folder, rows, out=tmp_path / "out", quiet=True, on_step=stop, **SETTINGS)
    assert (tmp_path / "out" / "metrics.jsonl").is_file()
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 0
