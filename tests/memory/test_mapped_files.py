"""Mapped pages of a file are given back while they are read, and what is read stays right."""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorakeet.memory import mapped_files
from lorakeet.memory.mapped_files import release_pages, releasing_pages
from tiny.proc import proc_file

SIZE = 8 << 20

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file.bin"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def held(path: Path) -> int:
    """Bytes of the file's pages that count as this process's."""
    lines, found, here = Path("/proc/self/smaps").read_text().splitlines(), 0, False
    for line in lines:
        if "-" in line.split()[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@linux
@pytest.mark.parametrize("stays", [False, True])
def test_pages_go_and_come_again(file: Path, stays: bool) -> None:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        before = bytes(data)
        assert held(file) == SIZE
        assert release_pages(file, stays=stays) == SIZE and held(file) == 0
        assert bytes(data) == before and held(file) == SIZE


@linux
@pytest.mark.parametrize("stays", [False, True])
def test_they_go_while_the_file_is_read(file: Path, stays: bool) -> None:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        with releasing_pages(file, interval=0.001, stays=stays):
            assert sum(data[:SIZE]) == 255 * SIZE // 2
            until = time.monotonic() + 10
            while held(file) and time.monotonic() < until:
                time.sleep(0.001)
            assert held(file) == 0
            data[SIZE - 1]
        assert held(file) == 0, "and once more at the end"


@linux
def test_memory_that_has_taken_the_place_of_a_mapping_keeps_its_numbers(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at what is mapped and the advice a library may remove its mapping, and something else get its place."""
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as data:
        data[:] = b"\x07" * SIZE
        view = (ctypes.c_char * SIZE).from_buffer(data)
        begin = ctypes.addressof(view)
        del view
        proc_file(monkeypatch, "/proc/self/maps", f"{begin:x}-{begin + SIZE:x} r--s 00000000 fe:00 1234 {file}\n")
        release_pages(file)
        assert data[:] == b"\x07" * SIZE


@linux
def test_a_system_that_does_not_page_out_gives_nothing_back(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        before = bytes(data)
        monkeypatch.setattr(mapped_files.ctypes, "CDLL", lambda _: SimpleNamespace(madvise=lambda *_: -1))
        assert release_pages(file) == 0 and held(file) == SIZE and bytes(data) == before


def test_a_system_without_a_list_of_mappings_gives_nothing_back(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc_file(monkeypatch, "/proc/self/maps", None)
    assert release_pages(file) == 0
