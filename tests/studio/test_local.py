"""`studio.local`: pages neither fetch nor unpack a model, nor load a data set of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.config import read_run
from lorakeet.errors import EnvironmentProblem
from lorakeet.studio import local
from lorakeet.studio.local import fetched_rows, require_local_rows, unready_model


def test_a_model_of_the_hub_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_run(None, {"model.path": "nobody/nothing", "data.train": "rows.jsonl"})
    monkeypatch.setattr(local, "on_this_machine", lambda spec: None)
    assert "'nobody/nothing' is not on this machine" in unready_model(config)


def test_a_file_that_was_not_unpacked_is_not_unpacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = read_run(None, {"model.path": str(tmp_path), "data.train": "rows.jsonl"})
    assert unready_model(config) == ""
    monkeypatch.setattr(local, "bytes_to_unpack", lambda spec: 3 << 30)
    assert "takes 3.00 GiB" in unready_model(config)


@pytest.mark.parametrize("setting", ["data.train", "data.held_out", "data.test"])
@pytest.mark.parametrize("name", ["hub:owner/name#train", "owner/name"])
def test_rows_of_the_hub_are_not_loaded(setting: str, name: str) -> None:
    config = read_run(None, {"model.path": "none", "data.train": "rows.jsonl", setting: name})
    assert fetched_rows(config.data) == [name]
    with pytest.raises(EnvironmentProblem, match="nothing is fetched here"):
        require_local_rows(config.data)


def test_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    require_local_rows(read_run(None, {"model.path": "none", "data.train": str(tmp_path / "rows.jsonl")}).data)
