"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.formats.files.whole_output import new_output, require_free, require_new


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_leaves_nothing_behind(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "made" / "out"

    def make(partial: Path) -> None:
        if kind == "folder":
            partial.mkdir()
            (partial / "a").write_text("a")
        else:
            partial.write_text("a")

    message = r"The model needs 10 bytes on the disk of .*made, and [\d,]+ are free, but a quota .* before that\. Free some space"
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


def test_the_check_counts_what_is_written_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    require_free(tmp_path, 10, "The model", written=1)
    with pytest.raises(EnvironmentProblem, match=r"needs 11 bytes on the disk of .*, and 9 are free\."):
        require_free(tmp_path, 11, "The model", written=1)


def test_a_link_that_leads_nowhere_is_something(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="out exists already"):
        require_new(tmp_path / "out")
