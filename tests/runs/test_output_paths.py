"""`runs.output_paths`: what keeps a result from being written is said before the work begins."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.memory.store import StoreRefused
from lorakeet.runs.output_paths import require_empty, require_place, store_folder, temporary_folder, writing


def test_a_folder_below_an_existing_one_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path / "new", tmp_path / "a" / "b" / "c", Path("relative"), Path("runs/one")):
        require_place(out)
    assert list(tmp_path.iterdir()) == []


def test_the_stores_of_two_results_of_one_name_do_not_meet(tmp_path: Path) -> None:
    """Each begins with an empty folder, which would empty the other's."""
    outs = [tmp_path / "a" / "out", tmp_path / "b" / "out"]
    named = [store_folder(str(tmp_path / "store"), out) for out in outs]
    assert len(set(named)) == 2 and {folder.parent for folder in named} == {tmp_path / "store"}
    assert [store_folder("", out) for out in outs] == [out.parent / ".out.blocks" for out in outs]


def test_nothing_can_be_made_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentProblem, match=r"since .*file is a file\. Choose another --out"):
        require_place(tmp_path / "file" / "run")


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(EnvironmentProblem, match="may not be written to"):
        require_place(tmp_path / "run")


def test_an_empty_folder_is_a_place_and_a_full_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    require_empty(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="nothing in it was touched"):
            require_empty(taken)


@pytest.mark.parametrize(("number", "why"), [(errno.ENOSPC, "is full"), (errno.EACCES, "the system refused")])
def test_a_refused_write_is_said_in_words(number: int, why: str) -> None:
    with (
        pytest.raises(EnvironmentProblem, match=f"The report could not be written: .*{why}.*Do this"),
        writing("The report", "Do this."),
    ):
        raise OSError(number, "no")


def test_a_temporary_folder_is_empty_and_goes_whatever_happens(tmp_path: Path) -> None:
    folder = tmp_path / "a" / ".out.blocks"
    folder.mkdir(parents=True)
    (folder / "left over").write_text("x")
    with pytest.raises(EnvironmentProblem, match=r"full\. Choose another\."), temporary_folder(folder, "It", "Choose another."):
        assert list(folder.iterdir()) == []
        raise StoreRefused("full.")
    assert not folder.exists()
    with temporary_folder(None, "Nothing", ""):
        assert list((tmp_path / "a").iterdir()) == []
