"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.formats.files.whole_output import new_output, require_new, whole_file


def test_a_file_replaces_the_old_one_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ValueError, match="no"), whole_file(path) as partial:
        partial.write_text("half")
        raise ValueError("no")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    with whole_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_leaves_nothing_behind(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "made" / "out"

    def make(partial: Path) -> None:
        if kind == "folder":
            partial.mkdir()
            (partial / "a").write_text("a")
        else:
            partial.write_text("a")

    message = r"The model needs 10 bytes on the disk of .*made, and [\d,]+ are free\. Free some space or name an --out"
    with pytest.raises(EnvironmentProblem, match=message), new_output(out, 10, "The model") as partial:
        make(partial)
        raise OSError(errno.ENOSPC, "full")
    assert os.listdir(out.parent) == []
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
        with pytest.raises(EnvironmentProblem, match="and 9 are free"), new_output(out, 10, "The model"):
            pass
    with new_output(out, 1, "The model") as partial:
        make(partial)
    assert os.listdir(out.parent) == ["out"]
    with pytest.raises(ConfigError, match="out exists already and is never overwritten"):
        require_new(out)
