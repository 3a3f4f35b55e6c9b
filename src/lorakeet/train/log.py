"""Metrics: always metrics.jsonl, and one optional sink (TensorBoard, Weights & Biases, Trackio, MLflow)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorakeet.disk import open_in_place, read_regular
from lorakeet.errors import DataError, EnvironmentProblem

Record = Mapping[str, float | int | None]
_EXTRAS = {"tensorboard": "track", "wandb": "wandb", "trackio": "trackers", "mlflow": "trackers"}  # by package


class MetricsLog:
    """metrics.jsonl: one JSON object per line, appended and flushed in order."""

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        """Opens `path` and truncates it to `keep` bytes, its size at the checkpoint that is resumed."""
        size = path.stat().st_size if path.exists() else 0
        if size < keep:
            raise DataError(
                f"{path} has {size} bytes, but the checkpoint was written after {keep}: the file was changed. "
                "Restore the original, or start a new run."
            )
        self._file = open_in_place(path)
        self._file.truncate(keep)
        self._file.seek(keep)
        self.offset = keep

    def write(self, record: Record) -> None:
        """Appends one record; NaN and infinity become null."""
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in record.items()}
        line = (json.dumps(finite) + "\n").encode()
        rest = memoryview(line)
        while rest:  # on a disk with little space a part is written, and the next call says that it is full
            rest = rest[self._file.write(rest) :]
        self.offset += len(line)

    def flush(self) -> None:
        """Syncs all records to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl without a truncated last line."""
    if not path.exists():
        return []
    lines = read_regular(path).split(b"\n")
    return [json.loads(line) for line in lines[:-1]]  # after the last newline: empty, or half a record


def require_sink(log_to: str) -> None:
    """Raises EnvironmentProblem if the package of `train.log_to` is not installed."""
    if log_to in _EXTRAS and find_spec(log_to) is None:
        raise _missing(log_to)


class TensorBoardSink:
    """Event files in RUN/tensorboard; points after `step` of an earlier, interrupted run are hidden."""

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: Record) -> None:
        for key, value in record.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run; its id is a hash of the folder, so that a resumed run continues it."""

    def __init__(self, folder: Path) -> None:
        import wandb

        self._run = wandb.init(project="lorakeet", name=folder.name, dir=str(folder), id=_id_of(folder), resume="allow")

    def write(self, record: Record) -> None:
        values = {key: value for key, value in record.items() if key != "step" and value is not None}
        self._run.log(values, step=record["step"])

    def close(self) -> None:
        self._run.finish()


class TrackioSink:
    """A Trackio run on this machine (`trackio show`); a resumed run continues it, by a hash of the folder in its name."""

    def __init__(self, folder: Path) -> None:
        import trackio

        self._trackio: Any = trackio
        with redirect_stdout(sys.stderr):  # where --json prints its result alone
            self._run = trackio.init(
                project="lorakeet", name=f"{folder.name}-{_id_of(folder)[:6]}", resume="allow", embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip

    def write(self, record: Record) -> None:
        values = {key: value for key, value in record.items() if key != "step" and value is not None}
        self._run.log(values, step=record["step"])

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


class MlflowSink:
    """An MLflow run at MLFLOW_TRACKING_URI, else in RUN/mlflow.db; a resumed run continues it by a tag of the folder."""

    def __init__(self, folder: Path) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric: Any = Metric
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=place)
        known = self._client.get_experiment_by_name("lorakeet")
        experiment = self._client.create_experiment("lorakeet") if known is None else known.experiment_id
        found = self._client.search_runs([experiment], f"tags.`lorakeet.run` = '{_id_of(folder)}'")
        tags = {"lorakeet.run": _id_of(folder)}
        run = found[0] if found else self._client.create_run(experiment, run_name=folder.name, tags=tags)
        self._run = run.info.run_id
        self._client.update_run(self._run, status="RUNNING")

    def write(self, record: Record) -> None:
        step, now = record["step"], int(time.time() * 1000)
        values = {key: value for key, value in record.items() if key != "step" and value is not None}
        self._client.log_batch(self._run, [self._metric(key, value, now, step) for key, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


Sink = TensorBoardSink | WandbSink | TrackioSink | MlflowSink  # a further destination of records
_SINKS: dict[str, Callable[[Path], Sink]] = {"wandb": WandbSink, "trackio": TrackioSink, "mlflow": MlflowSink}


def sink_for(log_to: str, folder: Path, *, step: int = 0) -> Sink | None:
    """The sink that `train.log_to` names, for the run in `folder`, continued after `step`; None for "none"."""
    try:
        if log_to == "tensorboard":
            return TensorBoardSink(folder, step=step)
        return _SINKS[log_to](folder) if log_to in _SINKS else None
    except ImportError as error:
        raise _missing(log_to) from error


def _id_of(folder: Path) -> str:
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def _missing(log_to: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"train.log_to is {log_to}, but the package {log_to} is not installed. "
        f"Install it with: pip install 'lorakeet[{_EXTRAS[log_to]}]'; or set train.log_to to none."
    )
