"""The run folder: made, refused, opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakeet.errors import ConfigError
from lorakeet.train.run import RunFolder


def test_a_new_run_is_made_with_its_parents(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "deep" / "run")
    assert run.checkpoints.is_dir()
    run.write(run.config, "a: 1\n")
    assert RunFolder.open(run.path).config.read_text() == "a: 1\n"


def test_it_is_resumed_as_it_was_started(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).resume_command == f"lorakeet finetune --resume {tmp_path}"
    assert RunFolder(tmp_path / "a b").resume_command == f"lorakeet finetune --resume '{tmp_path}/a b'"
    assert RunFolder(tmp_path, "torchrun -m lorakeet").resume_command == f"torchrun -m lorakeet finetune --resume {tmp_path}"


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path).checkpoints.is_dir()


def test_an_existing_run_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(ConfigError) as error:
        RunFolder.create(tmp_path)
    assert f"lorakeet finetune --resume {tmp_path}" in str(error.value)
    assert "another --out" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_other_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="another --out") as error:
        RunFolder.create(tmp_path)
    assert "--resume" not in str(error.value)
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder.create(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="is not a run folder"):
        RunFolder.open(tmp_path)
    with pytest.raises(ConfigError, match="no run folder"):
        RunFolder.open(tmp_path / "none")


def test_opening_finishes_an_interrupted_replacement(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.write(run.config, "")
    (run.path / ".adapter.ready").mkdir()
    (run.path / ".adapter.ready" / "new").touch()
    (run.path / ".adapter.old").mkdir()
    step = run.checkpoints / "step-000001"
    step.mkdir()
    os.rename(step, run.checkpoints / ".step-000001.partial")
    RunFolder.open(run.path)
    assert [path.name for path in run.adapter.iterdir()] == ["new"]
    assert list(run.checkpoints.iterdir()) == []


def test_two_processes_cannot_train_one_run(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    half_written = run.checkpoints / ".step-000001.partial"
    half_written.mkdir()
    with run.locked():
        with pytest.raises(ConfigError, match="Another process is training"):
            RunFolder.open(run.path)
        assert half_written.is_dir()
    RunFolder.open(run.path)
    assert not half_written.exists()


def test_a_run_killed_before_it_had_settings_leaves_its_folder_free(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    (run.path / ".config.yaml.partial").write_text("half")
    assert RunFolder.create(run.path) == run
    run.write(run.config, "model: x")
    with pytest.raises(ConfigError, match="exists already"):
        RunFolder.create(run.path)


def test_a_run_is_known_by_its_folder_and_from_inside_its_adapter(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.adapter.mkdir(parents=True)
    (run.adapter / "adapter_model.safetensors").touch()
    assert RunFolder.at(run.path) is None and RunFolder.around(run.adapter) is None
    run.write(run.config, "a: 1\n")
    assert RunFolder.at(run.path) == run and RunFolder.at(run.adapter) is None
    for path in (run.path, run.adapter, run.adapter / "adapter_model.safetensors"):
        assert RunFolder.around(path) == run
    assert RunFolder.around(run.path / "checkpoints") is None
    (run.path / "another.safetensors").touch()  # beside a config.yaml, which may be another program's
    assert RunFolder.around(run.path / "another.safetensors") is None
