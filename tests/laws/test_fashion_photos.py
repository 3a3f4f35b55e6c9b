"""Where the demo's photos come from fails in words, never with a traceback."""

from __future__ import annotations

import http.client
import subprocess
import sys
from pathlib import Path

import pytest

from structure.tree import ROOT

sys.path.insert(0, str(ROOT))
photos = pytest.importorskip("demos.fashion.photos")


class Cut:
    """An answer that ends too early."""

    def __enter__(self) -> Cut:
        return self

    def __exit__(self, *_: object) -> None: ...

    def read(self) -> bytes:
        raise http.client.IncompleteRead(b"half")


def test_an_answer_that_is_cut_short_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos.urllib.request, "urlopen", lambda *_, **__: Cut())
    assert "IncompleteRead" in photos._from_address(tmp_path)


def test_a_package_without_the_files_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(command: list[str], *, cwd: str | None = None, **_: object) -> subprocess.CompletedProcess[str]:
        if cwd is not None:
            (Path(cwd) / "x.deb").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(photos.subprocess, "run", ran)
    monkeypatch.setattr(photos.shutil, "which", lambda name: name)
    assert photos._from_debian(tmp_path) == "dataset-fashion-mnist holds no train-images-idx3-ubyte.gz"
