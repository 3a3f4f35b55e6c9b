"""Starts a run folder: its settings and the record of its split, both or neither; or, on resuming, the split compared."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lorakeet.config import RunConfig, dump_yaml
from lorakeet.data.split import check_split_record, read_split_record, write_split_record
from lorakeet.disk import read_regular
from lorakeet.errors import RunStopped, is_device_fault, is_out_of_memory
from lorakeet.evaluate.report.rank_values import Search
from lorakeet.evaluate.values import from_text, to_text
from lorakeet.memory.cuda import device_fault_text, out_of_memory_text
from lorakeet.models.spec import ModelSpec
from lorakeet.runs.output_paths import writing
from lorakeet.train.checkpoint import found as checkpoints
from lorakeet.train.run import RunFolder


def hashes_of_parts(parts: Mapping[str, Any], model: ModelSpec | None = None) -> dict[str, str | list[str]]:
    """The SHA-256 of each part (values that JSON can hold) of what must be equal for a run to be resumed.

    With the `model` of a run of one process its settings come with a second hash, where earlier versions had another.
    """
    found: dict[str, str | list[str]] = {name: _sha256(value) for name, value in parts.items()}
    if model is not None:
        both = _sha256(model.identity()), _sha256(model.identity(own_device=True))
        found["model settings"] = both[0] if both[0] == both[1] else list(both)
    return found


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def begin_run(
    run: RunFolder, config: RunConfig, record: dict[str, object], *, resume: bool, rates: Search | None = None
) -> None:
    """Writes config.yaml and split.json of a new run; DataError where a resumed one does not see the same rows.

    `record` is the split as data/split describes it, `rates` the trial that chose the learning rate, where there was one.
    EnvironmentProblem where the folder cannot be written; it is then gone.
    """
    if resume and run.split.exists():
        check_split_record(read_split_record(run.split), record)
        return
    with writing(f"The run folder {run.path}", "Free some space, or choose another --out."):
        try:
            if not resume:
                RunFolder.create(run.path)
            run.write(run.config, dump_yaml(config))
            write_split_record(run.split, record)
            if rates is not None:
                run.write(run.rates, to_text(rates))
        except OSError:
            if not resume:
                shutil.rmtree(run.path, ignore_errors=True)
            raise


def rates_of(run: RunFolder) -> Search | None:
    """The trial that chose the learning rate of a run; None where there was none. DataError where its file is broken."""
    return from_text(Search, read_regular(run.rates).decode(), where=str(run.rates)) if run.rates.is_file() else None


@contextmanager
def stoppable(run: RunFolder) -> Iterator[None]:
    """A context that turns a second Ctrl-C in training, which stops at once, or a GPU that failed into RunStopped with what is
    kept."""
    try:
        yield
    except (KeyboardInterrupt, RuntimeError) as error:
        newest = next(reversed(checkpoints(run.checkpoints)), None)
        if isinstance(error, KeyboardInterrupt):
            kept = f"the newest checkpoint is {newest}" if newest else "no checkpoint was written yet"
            by = str(error) or "Ctrl-C"
            raise RunStopped(f"{by}: stopped at once, and {kept}. Resume with: {run.resume_command}") from None
        if not is_device_fault(error):
            raise
        kept = f"The newest checkpoint, {newest}, is whole" if newest else "No checkpoint was written yet"
        raise RunStopped(f"{device_fault_text(error, run.resume_command)} {kept}.") from error


@contextmanager
def evaluating(run: RunFolder) -> Iterator[None]:
    """A context that turns Ctrl-C, a signal of the same effect (train/processes), or a full device into RunStopped, with what is
    complete."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise RunStopped(
            f"{str(stopped) or 'Ctrl-C'}: the training is done and {run.adapter} is whole, but its evaluation was interrupted. "
            f"Evaluate it with: {run.resume_command}"
        ) from None
    except RuntimeError as error:
        said = f"The training is done and {run.adapter} is whole, but not evaluated."
        if is_device_fault(error):
            raise RunStopped(f"{said} {device_fault_text(error, run.resume_command)}") from error
        if not is_out_of_memory(error):
            raise
        raise RunStopped(f"{said} {out_of_memory_text(error)} Then evaluate it with: {run.resume_command}") from error
