"""The cache folder of .gguf models: where it is, and how a file is known by its content."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakeet.errors import EnvironmentProblem
from lorakeet.kernels.cache import cache_folder
from lorakeet.models.files import gguf_copy
from lorakeet.models.files.gguf_copy import content_digest, known_digest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF and more")
    return path


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path) -> None:
    monkeypatch.delenv("LORAKEET_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "lorakeet"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        content_digest(file)


def test_a_digest_is_computed_once_and_known_until_the_file_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path
) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    assert known_digest(file) == "" and not (tmp_path / "cache").exists(), "asking writes nothing"
    found = content_digest(file)
    assert known_digest(file) == found
    monkeypatch.setattr(gguf_copy, "sha256_of", lambda path: "computed again")
    assert content_digest(file) == found
    os.utime(file, ns=(1, 1))
    assert known_digest(file) == "" and content_digest(file) == "computed again" == known_digest(file)
