"""An adapter that PEFT wrote, for the tests of this folder to read or to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    from tiny.models import tiny_model
    from tiny.peft_oracle import by_peft

    by_peft(folder, tiny_model("llama"), target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture
def folder(plain_folder: Path, tmp_path: Path) -> Path:
    """A copy, to spoil, of an adapter that PEFT wrote."""
    return Path(shutil.copytree(plain_folder, tmp_path / "adapter"))
