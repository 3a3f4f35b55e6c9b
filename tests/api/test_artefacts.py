"""Merge, export and verify from Python are the verbs of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from torch import nn

import lorakeet as lk
from api.conftest import Shared
from lorakeet.errors import SPELLING, ConfigError, DataError
from tiny.runs import reviews


@pytest.mark.slow
def test_merged_exported_and_verified(shared: Shared, tmp_path: Path) -> None:
    merged = lk.merge(shared.run, out=tmp_path / "merged", quiet=True)
    assert merged.certificate.passed and (tmp_path / "merged" / "model.safetensors").is_file()
    exported = lk.export(shared.run.path, tmp_path / "mine.gguf", quant="f32", quiet=True)
    assert exported.certificate.passed
    found = lk.verify(shared.run, tmp_path / "merged", quiet=True)
    assert found.passed and [name.rstrip("/") for name in found.artefacts] == [str(tmp_path / "merged")]
    model = lk.load(tmp_path / "merged", dtype="float32")
    assert model.generate("alder", max_tokens=6) == shared.run.generate("alder", max_tokens=6)
    model.release()


def test_wrong_options_are_named(shared: Shared, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown key 'wheights' in lk.merge. Did you mean 'weights'"):
        lk.merge(shared.run, out=tmp_path / "x", wheights=(1.0,))
    with pytest.raises(ConfigError, match=r"quant in lk.export is 'q9'"):
        lk.export(shared.run, tmp_path / "x.gguf", quant="q9")


QUESTIONS = ["alder birch cedar GOOD", "birch BAD", ""]


def message_of(call: Callable[[], Any], kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("frame", [
    pandas.DataFrame({"review": ["a b"] * 8, "stars": [1, 2] * 4}),
    pandas.DataFrame({"text": ["a b"] * 7 + [None], "label": [1, 2] * 4}, index=[f"r{n}" for n in range(8)]),
])  # fmt: skip
def test_errors_of_a_frame_name_no_file_and_no_flag(frame: pandas.DataFrame) -> None:
    said = message_of(lambda: lk.rows(frame, held_out=0.2).train)
    assert "--" not in said and ".jsonl" not in said and "/" not in said.replace("and/or", "")
    if "review" in frame:
        assert "text_column='review'" in said and "label_column='stars'" in said
    else:
        assert "source index 'r7'" in said and "bad_rows='drop'" in said
    assert SPELLING.get()("data.format", "text") == "--data.format text", "outside it is a flag again"


def test_rows_of_a_repeated_index_stay_apart() -> None:
    frame = pandas.DataFrame(reviews(8), index=[3] * 8)
    assert len({row.source for row in lk.rows(frame, held_out=0.0).train}) == 8


def test_whole_numbers_beside_a_missing_one_stay_whole() -> None:
    """pandas makes 1 and 2 the fractions 1.0 and 2.0 where one is missing; labels were '1.0' and '2.0'."""
    frame = pandas.DataFrame({"text": [f"t{n} x" for n in range(9)], "label": [1, 2] * 4 + [None]})
    rows = lk.rows(frame, held_out=0.0, bad_rows="drop", near_duplicates=0)
    assert rows.labels == ("1", "2") and len(rows.train) == 8


def test_a_frame_is_answered(shared: Shared) -> None:
    frame = pandas.DataFrame({"text": QUESTIONS, "id": [7, 8, 9]}, index=["a", "b", "c"])
    answered = lk.predict(shared.run, frame, quiet=True)
    assert list(answered.index) == ["a", "b", "c"] and list(answered["id"]) == [7, 8, 9]
    answers = shared.run.classify(QUESTIONS[:2])
    assert list(answered["label"]) == [answers[0].label, answers[1].label, ""]
    assert list(answered["label_probability"])[:2] == pytest.approx([one.probability for one in answers], abs=1e-5)
    assert answered["label_probability"].isna()["c"] and answered["label_review"]["c"] == "yes"
    assert [row["label"] for row in lk.predict(shared.run, frame.to_dict("records"), quiet=True)] == list(answered["label"])
    said = message_of(lambda: lk.predict(shared.run, frame.rename(columns={"text": "words"}), quiet=True))
    assert said.startswith("data has no column 'text'") and "--" not in said


@pytest.mark.slow
def test_a_run_is_measured_again_and_gone_on_with(shared: Shared, tmp_path: Path) -> None:
    found = lk.evaluate(shared.run, quiet=True)  # type: ignore[operator]
    assert found.adapter.accuracy.value == shared.run.report.adapter.accuracy.value
    other = pandas.DataFrame(reviews(12, seed=5))
    again = lk.evaluate(shared.run, other, tmp_path / "again", quiet=True)  # type: ignore[operator]
    assert again.value.rows_of == 12
    assert (tmp_path / "again" / "report.json").is_file()
    with pytest.raises(DataError, match="is no run"):
        lk.resume(tmp_path)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(shared: Shared, tmp_path: Path) -> None:
    class Stopped(Exception): ...

    def stop(record: Any) -> None:
        if record["step"] == 4:
            raise Stopped

    train = lk.Train(steps=6, batch_size=8, learning_rate=0.02, checkpoint_every=2)
    with pytest.raises(Stopped):
        lk.finetune(shared.model, reviews(60), out=tmp_path / "half", quiet=True, train=train, on_step=stop,
                    evaluate=lk.Evaluate(resamples=200, drift_texts=0, answers=0, examples=0))  # fmt: skip
    run = lk.resume(tmp_path / "half", quiet=True)
    assert run.certificate.passed and max(record["step"] for record in run.metrics) == 6


@pytest.mark.parametrize(("call", "said"), [
    (lambda: lk.Lora(rank="8"), "rank in lk.Lora is '8' (text); expected a whole number"),
    (lambda: lk.Train(steps="6"), "steps in lk.Train is '6' (text)"),
    (lambda: lk.attach("x"), "net is 'x' (str); expected a torch module"),  # type: ignore[arg-type]
    (lambda: lk.attach(nn.ReLU(), lk.Lora(rank=2)), "the model has none that can be adapted"),
])  # fmt: skip
def test_wrong_values_are_one_message(call: Callable[[], Any], said: str) -> None:
    assert said in message_of(call, ConfigError)


def test_wrong_arguments_of_a_run_are_one_message(shared: Shared) -> None:
    assert "Did you mean 'max_tokens'?" in message_of(lambda: shared.model.generate("a", max_new_tokens=4), ConfigError)
    assert "texts[1] is None" in message_of(lambda: shared.run.classify(["a", None]), ConfigError)  # type: ignore[list-item]
    assert "out is missing" in message_of(lambda: lk.predict(shared.run, "rows.csv"), ConfigError)


def test_what_is_documented_of_a_report_is_there(shared: Shared) -> None:
    report = shared.run.report
    assert report.base.loss == report.base.log_loss


@pytest.mark.slow
def test_everything_shows_itself(shared: Shared, tmp_path: Path) -> None:
    merged = lk.merge(shared.run, out=tmp_path / "merged", quiet=True)
    for one in (shared.model, shared.run.adapter, merged, shared.run, shared.rows, merged.certificate, shared.model.plan()):
        assert len(repr(one)) < 300 and "<table>" in one._repr_html_()
    assert len(repr(shared.run.report)) < 300


def test_rows_in_memory_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path))
    assert len(lk.rows(reviews(20), held_out=0.2).train) == 16
    assert not list(tmp_path.rglob("*.jsonl"))
