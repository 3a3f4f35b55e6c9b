"""What is written appears whole or not at all, and never through a link."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from lorakeet import disk
from lorakeet.disk import open_buffered, open_regular, read_regular
from tiny.full_disk import files_up_to


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that nothing may write to."""
    path = tmp_path / "victim"
    path.write_bytes(b"precious")
    return path


def test_a_file_has_the_old_content_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="no"), disk.written_whole(path) as made:
        made.write_bytes(b"half")
        raise ValueError("no")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
    disk.write_whole(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_a_folder_appears_with_all_that_is_in_it(tmp_path: Path) -> None:
    with disk.written_whole(tmp_path / "a") as made:
        (made / "inner").mkdir(parents=True)
        (made / "inner" / "file").write_text("x")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "inner" / "file").read_text() == "x" and os.listdir(tmp_path) == ["a"]


def test_the_place_of_the_writing_is_new_each_time_and_the_owners_alone(tmp_path: Path) -> None:
    seen = set()
    for _ in range(2):
        with disk.written_whole(tmp_path / "a") as made:
            made.write_text("x")
            assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700 and made.name == "a"
            seen.add(made.parent)
    assert len(seen) == 2 and (tmp_path / "a").stat().st_mode == Path(made.parent.parent / "a").stat().st_mode


def test_all_of_it_is_synced_before_the_rename_and_the_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def replaced(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with disk.written_whole(tmp_path / "a") as made:
        (made / "inner").mkdir(parents=True)
        (made / "inner" / "file").write_text("x")
    assert done == ["file", "inner", "a", "rename", tmp_path.name]


@pytest.mark.parametrize("name", [".a.partial", "a"])
def test_a_link_at_the_name_is_replaced_and_what_it_names_stays(tmp_path: Path, victim: Path, name: str) -> None:
    (tmp_path / name).symlink_to(victim)
    disk.write_whole(tmp_path / "a", b"new")
    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "a").read_bytes() == b"new" and not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_a_new_file_is_new(tmp_path: Path, victim: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "file":
        path.write_bytes(b"old")
    else:
        path.symlink_to(victim if kind == "link" else tmp_path / "nothing")
    with pytest.raises(FileExistsError):
        disk.write_new(path, b"new")
    assert victim.read_bytes() == b"precious" and not (tmp_path / "nothing").exists()


def test_a_file_that_is_changed_in_place_is_a_file(tmp_path: Path, victim: Path) -> None:
    with disk.open_in_place(tmp_path / "log") as file:
        file.write(b"one")
    with disk.open_in_place(tmp_path / "log") as file:
        assert file.read() == b"one"
    (tmp_path / "link").symlink_to(victim)
    os.mkfifo(tmp_path / "pipe")
    for name, code in (("link", errno.ELOOP), ("pipe", errno.EINVAL)):
        with pytest.raises(OSError) as refused:
            disk.open_in_place(tmp_path / name)
        assert refused.value.errno == code
    assert victim.read_bytes() == b"precious"


def test_only_files_are_opened_to_be_read(tmp_path: Path, victim: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(OSError, match="it is no file"):
            disk.open_regular(path)
    with disk.open_regular(victim) as file:
        assert file.readall() == b"precious"


def test_the_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    disk.write_whole(tmp_path / "link" / "a", b"new")
    with disk.written_whole(tmp_path / "link" / "b") as made:
        made.mkdir()
        (made / "file").write_bytes(b"x")
    assert (tmp_path / "real" / "a").read_bytes() == b"new" and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path / "real")) == ["a", "b"]


def test_a_link_inside_what_is_written_is_not_followed(tmp_path: Path, victim: Path) -> None:
    with pytest.raises(OSError) as refused, disk.written_whole(tmp_path / "a") as made:
        made.mkdir()
        (made / "link").symlink_to(victim)
    assert refused.value.errno == errno.ELOOP and os.listdir(tmp_path) == ["victim"]


def test_a_stage_is_in_use_until_its_writing_ends(tmp_path: Path) -> None:
    with disk.written_whole(tmp_path / "a") as made:
        made.write_bytes(b"x")
        assert disk.stage_in_use(made.parent) and not disk.stage_in_use(tmp_path) and not disk.stage_in_use(made)
    assert not disk.stage_in_use(made.parent)


def test_what_a_killed_process_left_is_removed_by_the_next_writing(tmp_path: Path) -> None:
    for content in ("half", ""):
        child = os.fork()
        if not child:
            with disk.written_whole(tmp_path / "a") as made:
                if content:
                    made.write_text(content)
                os._exit(0)  # as a kill: nothing is tidied
        os.waitpid(child, 0)
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and os.listdir(left[0]) == []  # the second writing removed the first one's
    os.utime(left[0], (0, 0))
    disk.write_whole(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"]


def test_a_writing_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    with disk.written_whole(tmp_path / "a") as first:
        first.write_text("first")
        os.utime(first.parent, (0, 0))
        disk.write_whole(tmp_path / "a", b"second")
        assert first.read_text() == "first"
    assert (tmp_path / "a").read_text() == "first" and os.listdir(tmp_path) == ["a"]


def test_what_merely_has_such_a_name_is_left_alone(tmp_path: Path, victim: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    (tmp_path / f".a.{'0' * 16}.partial").symlink_to(kept)
    (tmp_path / f".a.{'1' * 16}.partial").write_text("x")
    (tmp_path / f".b.{'2' * 16}.partial").mkdir()
    before = sorted(os.listdir(tmp_path))
    disk.write_whole(tmp_path / "a", b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "a"]) and (kept / "file").exists()


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    disk.write_whole(tmp_path / name, b"x")
    assert os.listdir(tmp_path) == [name]


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with files_up_to(1000), pytest.raises(OSError) as refused:
        disk.write_whole(path, bytes(5000))
    assert refused.value.errno in disk.FULL
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_remove_takes_a_link_and_not_what_it_names(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    disk.erase(tmp_path / "link")
    assert (tmp_path / "folder" / "file").exists() and not (tmp_path / "link").is_symlink()
    for name in ("folder", "victim", "nothing"):
        disk.erase(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file_is_never_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind in ("device", "loop"):
        path.symlink_to("/dev/zero" if kind == "device" else path)
    else:
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    for read in (read_regular, open_buffered, open_regular):
        with pytest.raises(OSError):
            read(path)


def test_no_more_than_the_limit_of_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    assert read_regular(tmp_path / "x", 3) == b"123"
    with pytest.raises(OSError, match="more than 2 bytes"):
        read_regular(tmp_path / "x", 2)
