"""ruff and mypy find nothing, with the settings of pyproject.toml."""

from __future__ import annotations

import subprocess
import sys

from structure.tree import ROOT


def output_of(*arguments: str) -> tuple[int, str]:
    run = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout + run.stderr


def test_ruff_finds_nothing() -> None:
    code, text = output_of("ruff", "check", ".")
    assert code == 0, text


def test_mypy_finds_nothing() -> None:
    code, text = output_of("mypy")
    assert code == 0, text
