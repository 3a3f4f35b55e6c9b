"""metrics.jsonl and the sinks."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import DataError, EnvironmentProblem
from lorakeet.train.log import Metrics, read_metrics, sink_for


def test_records_are_there_at_once_and_cut_on_going_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write({"step": 1, "loss": 2.5})
    kept = metrics.offset
    metrics.write({"step": 2, "loss": float("nan")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]
    metrics.close()
    again = Metrics(path, keep=kept)
    again.write({"step": 2, "loss": 2.0})
    again.close()
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none") == []


def test_a_shortened_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    with pytest.raises(DataError, match="has 3 bytes, but the checkpoint was written after 40"):
        Metrics(path, keep=40)
    assert path.read_text() == "{}\n"


def test_no_sink_by_default(tmp_path: Path) -> None:
    assert sink_for("none", tmp_path) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = sink_for("tensorboard", tmp_path)
    assert sink is not None
    for step in (1, 2):
        sink.write({"step": step, "loss": 0.5 * step, "lr": None})
    sink.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]


@pytest.mark.parametrize(("log_to", "extra"), [("tensorboard", "track"), ("wandb", "wandb")])
def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_to: str, extra: str) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.split(".", maxsplit=1)[0] in ("tensorboard", "wandb") or name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentProblem, match=rf"lorakeet\[{extra}\]"):
        sink_for(log_to, tmp_path)
