"""A run folder is begun whole, and on resuming its split is compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.config import RunConfig, read_run
from lorakeet.data.spec import DataSpec
from lorakeet.data.split import split_record
from lorakeet.errors import DataError, EnvironmentProblem
from lorakeet.models.spec import ModelSpec
from lorakeet.runs import run_folder
from lorakeet.train.checkpoint import require_same
from lorakeet.train.run import RunFolder

CONFIG = RunConfig(model=ModelSpec(path="m"), data=DataSpec(train="rows.jsonl"))


def test_settings_and_split_are_written_and_compared(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run_folder.begin_run(run, CONFIG, split_record([], []), resume=False)
    assert read_run(run.config) == CONFIG and run.split.is_file()
    run_folder.begin_run(run, CONFIG, split_record([], []), resume=True)
    with pytest.raises(DataError, match="data has changed since this run started"):
        run_folder.begin_run(run, CONFIG, {**split_record([], []), "held_out": ["x"]}, resume=True)


def test_an_identity_changes_with_its_part_alone() -> None:
    first, other = (run_folder.hashes_of_parts({"a": {"x": 1, "y": 2}, "b": value}) for value in ([1], [2]))
    assert first["a"] == other["a"] == run_folder.hashes_of_parts({"a": {"y": 2, "x": 1}})["a"]
    assert first["b"] != other["b"]


def test_a_run_that_an_earlier_version_began_on_the_second_gpu_goes_on_there() -> None:
    model = ModelSpec(path="m", device="cuda:1")
    before = run_folder.hashes_of_parts({"model settings": {**model.identity(), "device": "cuda:1"}})
    require_same(before, run_folder.hashes_of_parts({"model settings": model.identity()}, model), run=Path("run"))
    first = ModelSpec(path="m", device="cuda:0")
    one, other = (run_folder.hashes_of_parts({"model settings": spec.identity()}, spec) for spec in (model, first))
    require_same(one, other, run=Path("run"))
    assert isinstance(other["model settings"], str), "as it always was"


def test_a_refused_write_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_split_record", refuse)
    with pytest.raises(EnvironmentProblem, match="full"):
        run_folder.begin_run(RunFolder(tmp_path / "run"), CONFIG, split_record([], []), resume=False)
    assert not (tmp_path / "run").exists()
