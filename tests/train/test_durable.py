"""Folders and files that are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import BPE

from lorakeet import disk
from lorakeet.train import durable


def fill(target: Path, text: str) -> None:
    with durable.new_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)


def content(target: Path) -> str:
    return (target / "inner" / "file").read_text()


def test_a_folder_replaces_the_one_before(tmp_path: Path) -> None:
    fill(tmp_path / "x", "one")
    fill(tmp_path / "x", "two")
    assert content(tmp_path / "x") == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_error_leaves_the_old_one(tmp_path: Path) -> None:
    fill(tmp_path / "x", "one")
    with pytest.raises(RuntimeError), durable.new_folder(tmp_path / "x") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert content(tmp_path / "x") == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("kill_at", range(14))
def test_a_kill_between_any_two_renames_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int) -> None:
    """Every rename, flush and deletion in turn is the last thing that the process does; nothing may be cleaned up after it."""
    fill(tmp_path / "x", "one")
    calls = 0

    class Killed(BaseException):
        pass

    def counted(real: object) -> object:
        def call(*arguments: object, **named: object) -> object:
            nonlocal calls
            if calls == kill_at:
                raise Killed
            calls += 1
            return real(*arguments, **named)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "rename", counted(os.rename))
        patch.setattr(disk, "flush", counted(disk.flush))
        patch.setattr(disk, "flush_folder", counted(disk.flush_folder))
        patch.setattr(durable, "flush_folder", counted(durable.flush_folder))
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        finished = False
        try:
            fill(tmp_path / "x", "two")
            finished = True
        except Killed:
            pass
    durable.recover(tmp_path)
    assert content(tmp_path / "x") in ({"two"} if finished else {"one", "two"})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_recover_leaves_what_another_process_writes(tmp_path: Path) -> None:
    (tmp_path / ".b.0123456789abcdef.partial").mkdir()
    with disk.written_whole(tmp_path / "a") as made:
        made.write_text("x")
        durable.recover(tmp_path)
        assert os.listdir(tmp_path) == [made.parent.name]
    assert (tmp_path / "a").read_text() == "x" and os.listdir(tmp_path) == ["a"]


def test_folders_are_replaced_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for text in ("one", "two"):
        fill(tmp_path / "link" / "x", text)
        assert content(tmp_path / "real" / "x") == text
    durable.recover(tmp_path / "link")
    assert os.listdir(tmp_path / "real") == ["x"]


def test_recover_deletes_what_was_being_deleted(tmp_path: Path) -> None:
    fill(tmp_path / "x", "one")
    os.rename(tmp_path / "x", tmp_path / ".x.old")
    durable.recover(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_rust_says_of_a_refused_write_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error, durable.as_os_error():
        Tokenizer(BPE()).save(str(tmp_path))  # the real library, where a folder stands
    assert error.value.errno == errno.EISDIR and not durable.is_full(error.value)
    with pytest.raises(OSError) as error, durable.as_os_error():
        raise Exception("No space left on device (os error 28)")
    assert error.value.errno == errno.ENOSPC and durable.is_full(error.value)
    for other in (ValueError("no os error"), OSError(errno.EACCES, "Permission denied (os error 28)")):
        with pytest.raises(type(other)) as passed, durable.as_os_error():
            raise other
        assert passed.value is other


def test_full_disk_is_recognised() -> None:
    assert durable.is_full(OSError(errno.ENOSPC, "No space left on device"))
    assert durable.is_full(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert not durable.is_full(OSError(errno.EACCES, "Permission denied"))
    assert not durable.is_full(ValueError("28"))


def test_space_is_the_remedy_of_a_full_disk_alone() -> None:
    remedy = "Free some space, or choose another --out."
    full = durable.refusal(OSError(errno.ENOSPC, "full"), "x failed", remedy)
    assert full.code == "disk-full" and str(full).endswith(remedy)
    other = durable.refusal(PermissionError(errno.EACCES, "no"), "x failed", remedy)
    assert other.code == "environment-refused"
    assert str(other).endswith("See that files can be written there, or choose another --out.")
