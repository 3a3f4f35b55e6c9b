"""The folder of what can be made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.kernels.cache import cache_folder


def test_the_environment_names_it_or_it_is_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("LORAKEET_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "lorakeet"
