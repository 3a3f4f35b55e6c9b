"""What tests of several verbs share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny.configs import SMALL


@pytest.fixture
def config_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config.json and nothing else; the order to the C library would outlast the test."""
    from lorakeet.kinds.text import kind as text

    monkeypatch.setattr(text, "return_freed_memory", lambda: True)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path
