"""metrics.jsonl and the sinks."""

from __future__ import annotations

import builtins
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import DataError, EnvironmentProblem
from lorakeet.train.log import MetricsLog, read_metrics, sink_for


def test_records_are_there_at_once_and_cut_on_going_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsLog(path)
    metrics.write({"step": 1, "loss": 2.5})
    kept = metrics.offset
    metrics.write({"step": 2, "loss": float("nan")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]
    metrics.close()
    again = MetricsLog(path, keep=kept)
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
        MetricsLog(path, keep=40)
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


def offline_history(folder: Path) -> list[dict[str, float]]:
    """What the real wandb wrote first below `folder`: protobufs in a LevelDB log (blocks of 32 KiB, records in pieces)."""
    from wandb.proto import wandb_internal_pb2

    file = min(folder.glob("wandb/offline-run-*/run-*.wandb"))  # their names begin with the time
    data, at, held, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + length]
        at += 7 + length
        at += -at % 2**15 if 2**15 - at % 2**15 < 7 else 0  # a header is never split over two blocks
        held = piece if kind in (1, 2) else held + piece  # whole, first; middle, last
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found += [{key: value for key, value in items.items() if key in ("_step", "loss", "held_out_loss")}] if items else []
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_gets_every_number_and_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONFIG_DIR": str(tmp_path / "settings")}.items():
        monkeypatch.setenv(name, value)
    names = []
    for run in (tmp_path / "run", tmp_path / "run", tmp_path / "other"):
        run.mkdir(exist_ok=True)
        sink = sink_for("wandb", run)
        assert sink is not None
        names.append((wandb.run.project, wandb.run.name, wandb.run.id))
        if len(names) == 1:
            sink.write({"step": 1, "loss": 0.5, "lr": None})
            sink.write({"step": 1, "held_out_loss": 0.75})
            sink.write({"step": 2, "loss": 0.25})
        sink.close()
    wandb.teardown()  # waits for its own process, which writes the files
    assert offline_history(tmp_path / "run") == [{"_step": 1, "loss": 0.5, "held_out_loss": 0.75}, {"_step": 2, "loss": 0.25}]
    assert names[0] == names[1] != names[2] and names[0][:2] == ("lorakeet", "run")


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
