"""How the library comes about: compiled once, kept, and said in words where it cannot be had."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakeet.core.native import library
from lorakeet.core.native.library import OFF, why_not
from tiny.native import needs_native


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found out before is found out anew, and what is found out here forgotten."""
    monkeypatch.delenv(OFF, raising=False)
    remembered = library.why_not, library._library, library._processor
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
    assert OFF in why_not() and library.library() is None


def test_a_processor_without_bf16_products_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_processor", lambda: frozenset({"avx512f"}))
    assert "AVX512_BF16" in why_not() and library.library() is None


def test_no_compiler_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if library.WANTED not in library._processor():
        pytest.skip("this processor has no bf16 products")
    monkeypatch.setenv("CC", str(tmp_path / "gcc"))
    assert "install" in why_not() and library.library() is None


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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert said in why_not() and "gcc 12" in why_not()
    assert not list((tmp_path / "cache").rglob("*"))[1:]  # a folder, at most


@needs_native
def test_it_is_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not why_not()
    (kept,) = (tmp_path / "lorakeet").iterdir()
    before = kept.stat().st_mtime_ns
    library.why_not.cache_clear()
    library._library.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *given: pytest.fail("compiled again"))
    assert not why_not()
    assert kept.stat().st_mtime_ns == before and len(list((tmp_path / "lorakeet").iterdir())) == 1


@needs_native
def test_without_a_cache_it_is_compiled_for_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lorakeet").write_text("a file where the folder would be", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert not why_not()
    assert (tmp_path / "lorakeet").is_file()


@needs_native
def test_it_computes_with_the_threads_of_torch() -> None:
    """A second OpenMP would bring threads of its own."""
    found = library.library()
    assert isinstance(found, ctypes.CDLL)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert found.omp_get_max_threads() == threads  # as the library's own OpenMP has it
    finally:
        torch.set_num_threads(before)
