"""How the library comes about: compiled once, kept, and said in words where it cannot be had."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.kernels.cache import cache_folder
from lorakeet.kernels.cpu import compile
from lorakeet.kernels.cpu.compile import OFF, why_not
from tiny.native import needs_native
from tiny.proc import proc_file

KEPT = cache_folder() / "native"  # where it was compiled to when the tests were collected


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found out before is found out anew, and what is found out here forgotten."""
    monkeypatch.delenv(OFF, raising=False)
    monkeypatch.delenv("CC", raising=False)
    remembered = compile.why_not, compile._lacks, compile._library, compile._processor
    for found in remembered:
        found.cache_clear()
    yield
    for found in remembered:
        found.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A program that is called like gcc."""
    path = folder / "gcc"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_variable_of_the_environment_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFF, "0")
    assert OFF in why_not() and compile.library() is None


def test_a_processor_without_bf16_products_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    proc_file(monkeypatch, "/proc/cpuinfo", "flags\t\t: fpu avx512f\n")
    assert "has no avx512_bf16, avx512_vnni" in why_not() and compile.library() is None


def test_no_compiler_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not compile.suits_machine():
        pytest.skip("this processor has no bf16 products")
    monkeypatch.setenv("CC", str(tmp_path / "gcc"))
    assert "install" in why_not() and compile.library() is None


@needs_native
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('[ "$1" = --version ] || { echo "x.c: error: no such -march" >&2; exit 1; }', "no such -march"),
        ("exit 3", "cannot compile"),
    ],
)
def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, said: str) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    assert said in why_not() and "gcc 12" in why_not()
    assert not list((tmp_path / "cache").rglob("*"))[1:]  # a folder, at most


@needs_native
def test_it_is_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real compiler makes it in tests/laws/test_wheel."""
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path))
    with gcc_replaced(monkeypatch) as commands:
        assert not why_not() and sum("-shared" in command for command in commands) == 1
        (kept,) = (tmp_path / "native").iterdir()
        before = kept.stat().st_mtime_ns
        compile.why_not.cache_clear()
        compile._library.cache_clear()
        commands.clear()
        assert not why_not()
    assert commands == [["gcc", "--version"]]
    assert kept.stat().st_mtime_ns == before and len(list((tmp_path / "native").iterdir())) == 1


def open_to_others(folder: Path) -> None:
    (folder / "native").mkdir()
    (folder / "native").chmod(0o777)


def no_folder(folder: Path) -> None:
    (folder / "native").write_text("a file where the folder would be", encoding="utf-8")


@needs_native
@pytest.mark.parametrize("spoil", [open_to_others, no_folder])
def test_a_cache_that_is_not_ours_alone_is_left_alone(
    spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What lies there would be run. The library is compiled into a folder that goes away again."""
    spoil(tmp_path)
    (tmp_path / "for a moment").mkdir()
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "for a moment"))
    with gcc_replaced(monkeypatch) as commands:
        assert not why_not()
    assert "-shared" in commands[-1] and not list((tmp_path / "for a moment").iterdir())
    assert not (tmp_path / "native").is_dir() or not list((tmp_path / "native").iterdir())


@contextmanager
def gcc_replaced(monkeypatch: pytest.MonkeyPatch, *, empty: int = 0) -> Iterator[list[list[str]]]:
    """gcc compiles nothing here, and links the library that this machine has; at first `empty` times a file of no bytes.

    Yields the commands so far.
    """
    commands: list[list[str]] = []
    real, linked = subprocess.run, 0

    def run(command: list[str], **more: Any) -> Any:
        nonlocal linked
        commands.append(command)
        if command[-1] == "--version":
            return real(command, **more)
        if "-shared" in command:
            linked += 1
            target = Path(command[-1])
            target.write_bytes(b"" if linked <= empty else (KEPT / target.name).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        yield commands


@needs_native
def test_a_file_that_was_not_written_to_its_end_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path))
    with gcc_replaced(monkeypatch, empty=1) as commands:
        assert "cannot be compiled or loaded" in why_not()
        compile.why_not.cache_clear()
        compile._library.cache_clear()
        assert not why_not() and sum("-shared" in command for command in commands) == 2


@needs_native
@pytest.mark.parametrize("named", ["", "env gcc", "gcc"])
def test_a_compiler_may_be_named_with_arguments(named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", named)
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path))
    with gcc_replaced(monkeypatch) as commands:
        why_not()
    assert commands[0] == [*(named.split() or ["gcc"]), "--version"]


@pytest.mark.slow
@needs_native
def test_it_computes_with_the_threads_of_torch() -> None:
    """A second OpenMP would bring threads of its own."""
    found = compile.library()
    assert isinstance(found, ctypes.CDLL)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert found.omp_get_max_threads() == threads  # as the library's own OpenMP has it
    finally:
        torch.set_num_threads(before)
