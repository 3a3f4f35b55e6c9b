"""The examples in the docstrings of the Python API are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import lorakeet.api

MODULES = sorted(module.name for module in pkgutil.iter_modules(lorakeet.api.__path__, "lorakeet.api."))


@pytest.mark.parametrize("name", [name for name in MODULES if name.rpartition(".")[2] in ("adapter", "attach", "rows")])
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path))
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted >= 4 and found.failed == 0


def test_every_module_with_examples_is_tried() -> None:
    files = Path(lorakeet.api.__path__[0]).parent.rglob("*.py")
    having = {path.stem for path in files if ">>> " in path.read_text(encoding="utf-8")}
    assert having == {"adapter", "attach", "rows"}
