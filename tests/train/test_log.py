"""metrics.jsonl and the sinks."""

from __future__ import annotations

import builtins
import json
import os
import struct
import subprocess
import sys
from importlib.util import find_spec
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


@pytest.mark.slow
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


LOGGED = """
import json, sys
from pathlib import Path
from lorakeet.train.log import sink_for

for part in (((1, 0.5), (2, 0.25)), ((3, 0.125),)):  # a run, and the same run resumed
    sink = sink_for(sys.argv[1], Path("run"))
    for step, loss in part:
        sink.write({"step": step, "loss": loss, "lr": None})
    sink.close()
other = sink_for(sys.argv[1], Path("other"))
other.write({"step": 1, "loss": 4.0})
other.close()
print("END")
"""
READ = {
    "trackio": """
import json
from trackio.sqlite_storage import SQLiteStorage as Storage
names = Storage.get_runs("lorakeet")
print(json.dumps({name[:-7]: [[log["step"], log["loss"]] for log in Storage.get_logs("lorakeet", name)] for name in names}))
""",
    "mlflow": """
import json
from mlflow import MlflowClient
found = {}
for folder in ("run", "other"):
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    for run in client.search_runs([client.get_experiment_by_name("lorakeet").experiment_id]):
        assert run.info.status == "FINISHED"
        found[run.info.run_name] = [[metric.step, metric.value] for metric in client.get_metric_history(run.info.run_id, "loss")]
print(json.dumps(found))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("log_to", ["trackio", "mlflow"])
def test_trackers_get_every_number_and_go_on_in_the_same_run(log_to: str, tmp_path: Path) -> None:
    """The real packages, offline, in processes of their own: they start threads and set up logging for all."""
    if find_spec(log_to) is None:
        pytest.skip(f"{log_to}, of the extra lorakeet[trackers], is not installed: make peers")
    for folder in ("run", "other"):
        (tmp_path / folder).mkdir()
    given = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "TRACKIO_"))}
    given |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    said = []
    for code in (LOGGED, READ[log_to]):
        command = [sys.executable, "-W", "ignore", "-c", code, log_to]
        ended = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, ended.stderr
        said.append(ended.stdout)
    assert said[0] == "END\n", "standard output belongs to the command's result"
    assert json.loads(said[1]) == {"run": [[1, 0.5], [2, 0.25], [3, 0.125]], "other": [[1, 4.0]]}


@pytest.mark.parametrize(
    ("log_to", "extra"), [("tensorboard", "track"), ("wandb", "wandb"), ("trackio", "trackers"), ("mlflow", "trackers")]
)
def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_to: str, extra: str) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.split(".", maxsplit=1)[0] in ("tensorboard", "wandb", "trackio", "mlflow") or name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentProblem, match=rf"lorakeet\[{extra}\]"):
        sink_for(log_to, tmp_path)
